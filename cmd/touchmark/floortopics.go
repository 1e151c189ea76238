package main

import "github.com/spf13/cobra"

// The three pages of the factory floor: each is enough for the one who reads it.

var technicianTopic = &cobra.Command{
	Use:   "technician",
	Short: "A technician's page: a shift at the station",
	Long: `You need a scanner. Enter and the function keys are all that is ever pressed; each function can be scanned as well.

START OF SHIFT
    touchmark station --line LINE        or what the engineer put on the screen

  Scan your badge. Type your PIN if it asks. The station looks at itself: a check that fails shows a code and what to do; do it and
  press Enter. When all are good it asks for a serial.

A UNIT
  Put the board into the fixture, scan its serial, wait. Several heads work at once: scan the next one as soon as a head is free.
  When the screen asks for the label, scan the label that came out of the printer.

    PASS    one bell     take the unit out, the next one
    FAIL    three bells  do what the line under the code says, once. The same unit fails too often: rework bin

  Nothing is lost when the power goes, the screen is closed or a cable is pulled. Start the station again and scan the unit again:
  it goes on where it stopped. A unit that passed says so, with when, where and by whom; it is never made twice.

KEYS                          SCAN INSTEAD
  F1   help                     TM!HELP
  F2   rework: new board        TM!REWORK      the serial gets its next revision, the old identity is dead
  F3   scrap                    TM!SCRAP
  F4   print the label again    TM!REPRINT     counted, for units that passed
  F10  end of shift             TM!END
  Esc  leave a function         TM!CANCEL
  Enter alone: yes              TM!YES

CODES
  E-1xx  what you scanned      E-2xx  the order: call your lead    E-3xx  the station
  E-4xx  the fixture: reseat   E-5xx  the label                    E-6xx  the identity: call your lead
  L-8xx  a lamp: go on working, tell your lead`,
}

var lineTopic = &cobra.Command{
	Use:   "line-engineer",
	Short: "A line engineer's page: from an empty machine to a station that runs",
	Long: `You need: the owner's public key (owner.pem), the owner's order when it is there, a token or a folder for the line's keys.

1  THE LINE
    touchmark init line-3 --id-scope 0ne00112233 --owner owner.pem --counter line-3 \
        --key-uri 'pkcs11:token=line-3?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/touchmark/pin'
  --owner: from now on nothing is made without an order that this key signed. --counter: the ledger is tied to a counter in
  the token, so a copy of it, or one from a backup, is refused. Key files (no --key-uri) have no counters: then whoever copies
  the line's folder copies its right to make what is left of an order. Give station.pem, issuing.pem and the profile to the owner.

2  THE PRODUCT
  line-3/profiles/*.toml say what devices get: attestation, certificate, files and images to stamp. Whatever is in the profile when
  the owner writes the order is what the order is for. What storage takes:
    directories, NVS partitions (ESP32), U-Boot environments, FAT images, raw TLV with two copies, Intel HEX, PKCS#11 objects, TPM NV

3  THE STATION
  line-3/station.toml says what is done to a unit: probe, flash, readback, challenge, label. Each command is a list of words,
  without a shell; the unit's files are in {dir}; secrets are in files only. The steps:
    probe → mint → flash → read back → challenge → label → scan → sealed
    touchmark operator add 'Mai Tran' --file line-3/operators.toml --pin      (operators = "operators.toml")
    touchmark station golden --line line-3 --accept                           (golden = "golden.json")

4  TRY IT
    touchmark order take PO-1234.order --line line-3
    echo '{"op":"make","serial":"SN00001"}' | touchmark station --line line-3 --json --operator me --dry-run
    touchmark station --line line-3
  Fixtures and factory systems drive the same station by --json, or --socket; hooks and webhooks tell them what became of units;
  metrics.listen serves OpenMetrics and a page.

5  EVERY DAY
    touchmark bundle export --line line-3 --profile x509-group --order PO-1234 --out monday.tmb    to the operator
    touchmark order list --line line-3                                                             what is left
    touchmark unit show SN00007 --line line-3                                                      what became of it
    touchmark ledger verify --line line-3
  Back the line's folder up as you like: a restored ledger is refused where there is a counter, and what it lacks is named.

MORE STATIONS
  Stations share the issuing CA, by a shared token (init --issuing-key, --issuing-chain, --key-prefix), and work on leases:
    touchmark order lease PO-1234 --line line-3 --station line-4/station.pem --quantity 500 --out a.lease
    touchmark order take a.lease --line line-4       (line-4's touchmark.toml: [orders] holders = ["line-3.pem"])
    touchmark order return PO-1234/NAME --line line-4 --out a.return
    touchmark order receive a.return --line line-3 --station line-4/station.pem`,
}

var ownerTopic = &cobra.Command{
	Use:   "owner",
	Short: "An owner's page: order 5,000 units, and prove that 5,000 were made",
	Long: `You need a key that the factory never sees, best in a token at the office, and three files from the line: station.pem (who may
make), issuing.pem (with which CA), and the profile (what).

1  YOUR KEY, ONCE
    touchmark key new --store file:office --create --name owner
    touchmark key export-public --store file:office --name owner --out owner.pem
  The line gets owner.pem and nothing else (touchmark init --owner).

2  THE ORDER
    touchmark order new PO-1234 --product 'pump 3' --quantity 5000 --profile x509-group.toml --serial-from SN00001 --serial-to SN05000 \
        --id-scope 0ne00112233 --issuer issuing.pem --holder station.pem --until 2026-12-31 --out PO-1234.toml
  Read PO-1234.toml: it is all that you sign. --counter NAME asks for the ledger that is tied to the line's counter of that name (the
  line engineer knows it), so that not even a new ledger makes the order a second time.
    touchmark order sign PO-1234.toml --store file:office --key owner --out PO-1234.order

3  MEANWHILE
  The operator's service must know you: touchmark serve --owner owner.pem --require-orders. Bundles carry their order, and one beyond
  it is refused, entry by entry, each by its name.
  Scrapped units count. To allow others in their place, once you know that they are destroyed:
    touchmark order permit PO-1234 SN00007 --reason 'shredded, certificate 77' --store file:office --key owner --out permit
  Keep the checkpoints that bundles carry: touchmark ledger check and ledger compare tell whether the line's ledger still holds
  what it held then.

4  THE PROOF
    touchmark order close PO-1234 --line line-3 --out PO-1234.report            the line does this
    touchmark reconcile PO-1234.report --trust station.pem --service owner.connection
  ordered = minted = stamped = verified = sealed = exported = imported, and seen in the field. Each unit that is missing is named,
  with its state, and each attempt to make what the order does not allow. touchmark ledger prove SERIAL gives a file about one unit that
  anybody checks with station.pem alone.

WHAT KEEPS THE COUNT
  A unit is booked on the order in the same step of the ledger that begins it, before anything is signed; the ledger is signed
  step by step and tied to a counter in the line's token. The service counts again when it imports, over all stations, and a
  closed group (closed = true in the profile) admits nobody who came in no bundle. With key files instead of a token nothing at
  the line tells a copied ledger; then the service is what refuses the second 5,000.`,
}
