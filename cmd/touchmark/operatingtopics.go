package main

import "github.com/spf13/cobra"

// Two pages for who looks after enrollments: the daily jobs, and moving between services.

var operatingTopic = &cobra.Command{
	Use:   "operating",
	Short: "Operators' daily jobs at a registration service, ours or Azure's",
	Long: `These commands speak the service API, so they work with touchmark's service and with Azure's. Each needs a file with the service's
connection string, by --service or in TOUCHMARK_SERVICE:

    touchmark's    owner.connection in the service's data directory
    Azure's        az iot dps connection-string show -n NAME -o tsv --query connectionString > azure.connection; chmod 600 azure.connection

A ca.pem beside that file is what the service's certificate is checked against; without one it is the system's CAs.

WHY WAS THIS DEVICE REFUSED?
    touchmark diagnose pump-0001
  says it in plain words, and what to do next. touchmark remembers what devices tried; of Azure what can be seen is looked at. --group
  names the group that the device should come in by.

LET ONE DEVICE IN
    touchmark enrollment create pump-0001 --certificate-path pump-0001.pem
    touchmark enrollment create pump-0002 --primary-key-file pump-0002.key --initial-twin-tags '{"site":"A7"}'
    touchmark enrollment create pump-0003 --endorsement-key @ek.b64

LET MANY IN
    touchmark enrollment import pumps.csv --dry-run
    touchmark enrollment import pumps.csv
  The dry run shows row by row what is new, what differs member by member, and what touchmark's service would refuse. Rows that are
  there already are unchanged. When it is cut off, the same command goes on. touchmark enrollment import --help has the columns, and
  what a dry run does not foresee.

KEEP ONE OUT
    touchmark enrollment disable pump-0001
  or, where it comes in by a group, make a disabled enrollment of its own, which beats the group:
    touchmark enrollment create pump-0001 --provisioning-status disabled
  This keeps it from registering. It keeps talking to its hub until it is disabled there too.

KEEP A WHOLE BATCH OUT
    touchmark group disable pumps

WHO CAME IN?
    touchmark registration list                           everybody; with --format csv for a spreadsheet
    touchmark registration list pumps                     who came in by a group, also one that was deleted since
    touchmark registration show pump-0001
  At touchmark's service the lists are GET /touchmark/registrations and /touchmark/groups/GROUP/registrations, with the right to read
  registrations, in pages as queries have them (x-ms-max-item-count, x-ms-continuation). At Azure every individual enrollment takes a call.
  To have a device begin anew at its next registration: touchmark registration delete pump-0001 --yes

ERASE ALL OF ONE DEVICE
    touchmark enrollment delete pump-0001 --yes           its enrollment, and the registration of an individual one
    touchmark registration delete pump-0001 --yes         its registration, where it came in by a group
    touchmark registration forget pump-0001 --yes         its attempts, with addresses and certificates
  In this order: who is still enrolled comes back by itself. The hub is not told: delete the device there. The service still knows what
  bundles said of the device (serial, hash of its key), so that it is the same device to later bundles; the audit record still has its
  ID. They go with the scope. Logs, metrics of other systems, and backups are yours to look after.

ERASE A SCOPE
    touchmark scope delete plant-b --yes                  all of it
    touchmark scope erase plant-a --yes                   all that is in it: it goes on with its name, ID scope, hubs and policies
  The first scope, which is the whole service where there are no others, is erased by the latter. touchmark help management says how far
  that reaches.

A NEW KEY OR A NEW CA FOR A GROUP
    touchmark group roll-key pumps --new-key pumps-2027.key
    touchmark group roll-ca pumps --certificate issuing-2027.pem
  Run it, move the devices, run it again: it shows who still uses the old one, and shuts out none of those unless --yes says so. Azure
  does not tell who does: there --yes has to say that all were moved.

HUBS, POLICIES AND CERTIFICATES
  These go over the management API, and need a file with its address and a token, by --management or in TOUCHMARK_MANAGEMENT.
  touchmark serve writes management.connection into its data directory. For Azure write one; its token runs out within the hour:
    Endpoint=https://management.azure.com;Token=TOKEN;Subscription=ID;ResourceGroup=NAME
  (az account get-access-token --query accessToken -o tsv)
    touchmark hub link --connection-string-file hub-a.connection --location westeurope
    touchmark hub update hub-a.example.net --connection-string-file hub-a.new      after its key was rolled
    touchmark policy roll-key provisioningserviceowner --key secondary --yes
    touchmark certificate create plant-root --certificate-path root.pem, then code, then verify

WHO WAITS FOR A HUB?
    touchmark hub outbox
    touchmark hub orphans list
    touchmark hub children gateway-7
  what hubs have yet to be told, how often that was tried and how it failed last; devices at hubs that could not be asked to forget
  them; and the devices below an edge device that wait for it. touchmark diagnose says it of one device. Only touchmark tells.

EVERYTHING INTO A FILE
    touchmark export --all --with-keys --out all.jsonl
  The file has keys in it. touchmark import all.jsonl brings it back, here or elsewhere: touchmark help migration.

LIMITS
  Calls are spaced as the service asks: on 429 all wait for as long as Retry-After says, go on at half the rate, and faster by and by.
  Azure takes some 1,000 calls a minute; ten enrollments are one call.`,
}

var migrationTopic = &cobra.Command{
	Use:   "migration",
	Short: "From Azure's registration service to touchmark's, and back",
	Long: `What moves is enrollments and groups, in one file that either service takes. What devices have in them does not change but for two
words: the ID scope, and the global endpoint.

WHAT MOVES
  IDs, device IDs, attestation by symmetric key (with --with-keys) and by TPM, twins, allocation and reprovision policies, status,
  device information, and members that touchmark does not know.

WHAT DOES NOT
  Certificates     No service shows them again, only their thumbprints. They are filled in from a folder (--certificates): the CA files of
                   groups, the devices' own certificates, or those that the factory kept. What is still missing is named.
  CA certificates  that groups name (--ca-name) have to be at the new service first, by the same names: touchmark certificate create.
  Registrations    A device is new to the new service. It is assigned again, by the same rules.
  Hubs             are linked by hand (touchmark hub link); --rename-hub FROM=TO is for those that have other names.
  etags, times     The new service makes its own.
  Closed groups, retired identities, orders
                   are touchmark's. Azure has no word for them: a closed group admits every device that its CA or key vouches for.

FROM AZURE
  1. touchmark export --all --service azure.connection --with-keys --certificates certs --out all.jsonl
     It says what each enrollment lacks. A key takes a call of its own: a million of them takes Azure some 17 hours.
  2. touchmark serve --data service --hub … with the hubs that enrollments name.
  3. touchmark import all.jsonl --service service/owner.connection --dry-run, then without it. The same command again finishes what was
     cut off, and afterwards shows that everything is unchanged.
  4. Take one device: touchmark register does what a device does, with its key or certificate, from anywhere.
  5. Give devices the new ID scope and endpoint, with an update of their software or from their hub. Those that keep their hub need
     nothing until they register again.
  6. Disable the groups at Azure. Delete nothing for as long as a device may come back there.

TO AZURE
  1. touchmark export --all --service service/owner.connection --with-keys --certificates certs --out all.jsonl
  2. At Azure: link the hubs, upload and verify the CA certificates.
  3. touchmark import all.jsonl --service azure.connection --dry-run, then without it. It goes in tens, as fast as Azure lets it.
  4. Bundles need no detour: touchmark import monday.tmb --service azure.connection --trust line-3/station.pem verifies one here and
     sends its enrollments. For symmetric keys mint with --recipient of an age key of yours, and name its file with --identity.
  5. touchmark init --id-scope says what the line's next devices are told.

Between two touchmark services it is the same. A whole service moves better as a copy of its store.`,
}
