package main

import "github.com/spf13/cobra"

var emulatorTopic = &cobra.Command{
	Use:   "emulator",
	Short: "A device developer's page: an Azure DPS of one's own, for tests",
	Long: `touchmark serve --ephemeral is a registration service for the tests of a device's firmware: Azure's device SDKs register against it
unchanged, nothing of it is on disk, and it fails on demand. It listens on this machine only, unless told otherwise.

START
    touchmark serve --ephemeral --seed my-tests --https 127.0.0.1:0 --mqtt 127.0.0.1:0 --ca-out ca.pem --json > ready.json &
    until grep -qs '"ready":true' ready.json; do kill -0 $! || exit 1; sleep 0.1; done
  When it is ready it prints one line of JSON: https, mqtt, amqp (addresses), idScope, ca (PEM), connectionString,
  symmetricGroup.primaryKey. --connection-out FILE puts the connection string into a file instead. kill %1 ends it.
  Port 0 is one that is free, so jobs run side by side; when one door is named so, the doors that are not named take one, too.
  --seed makes scope, CA and keys the same in every run: a device with the CA burnt in goes on working. Whoever knows the text has
  all keys: it is refused on other addresses than loopback, unless you say --expose-test-keys.

DEVICES
  Two groups are there, so any device registers:
    devices         key = base64(HMAC-SHA256(symmetricGroup.primaryKey, registration ID))
    devices-x509    a certificate with the registration ID as its common name, from the CA that --device-ca-out DIR writes
  --stamp DIR/ID and --stamp-x509 DIR/ID write what a device ID needs, as minting would. Or bring your own:
    --enroll monday.tmb --trust station.pem     a bundle; seal it to the recipient that the ready line names
    --enroll devices.json                       one enrollment or an array of them, as Azure's service API has it
  While it runs, Azure's service SDKs and touchmark import work on the connection string.

POINT AN SDK AT IT
  Host is localhost; the ports of most SDKs are fixed, so leave out --https, --mqtt and --amqp where these say so (443 may need rights).
    Node       ProvisioningDeviceClient.create(host, …)    MQTT takes host:port, HTTPS 443    NODE_EXTRA_CA_CERTS=ca.pem
    Python     provisioning_host=                          8883                               server_verification_cert= the PEM text
    C          Prov_Device_LL_Create(uri, …)               443, 8883                          OPTION_TRUSTED_CERT, the PEM text
    C#         ProvisioningDeviceClient.Create(host, …)    handler.Port                       system store, or the handler's callback
    Java       ProvisioningDeviceClient.create(host, …)    HTTPS takes host:port, MQTT 8883   -Djavax.net.ssl.trustStore, or the SSLContext
    Embedded C az_iot_provisioning_client_init(…)          yours                              yours
    FreeRTOS   AzureIoTProvisioningClient_Init(…)          yours                              yours
    NetX Duo   nx_azure_iot_provisioning_client_initialize 8883                               the certificates that you pass
    IoT Edge   global_endpoint = "https://host:port"       any                                system store
  A firmware that has global.azure-devices-provisioning.net built in needs that name to lead here, and --hostname for it.

FAULTS
  --fault TEXT, again for more. A fault is KEY=VALUE between commas; first for whom, and then what:
    rid=sensor-*|pump-1   op=register|status|lookup|challenge   protocol=https|mqtt|mqtt-ws|amqp|amqp-ws
    count=2 (so many times)   after=3 (not the first three)   nth=4 (the fourth only)   p=0.1 (by chance; with --seed the same each run)
    delay=2s   code=429 or code=401002   retry-after=banana, or -1, 0, 86400, none   drop, or drop=after the work is done
    lost (the operation is forgotten)   assigning=5 (for five polls)   disabled   failed=400208   hub=other.example.net
  Recipes:
    is backing off done right?            op=register,code=429,count=3,retry-after=5
    does a bad hint do harm?              retry-after=banana      code=503,retry-after=86400,count=1
    is a lost answer asked for again?     op=register,drop=after,nth=1
    is the operation begun anew?          lost,count=1
    is waiting bounded?                   assigning=1000          delay=2m
    is a refusal final?                   rid=sensor-7,code=401   rid=sensor-7,disabled
    a bad day                             p=0.1,code=500          p=0.05,drop      p=0.2,delay=3s
  While it runs, a test changes them: touchmark fault add, set, list, clear; or PUT, POST, GET, DELETE of
  /touchmark/faults?api-version=2021-10-01 with an array of such texts and a token of the owner's. list tells how often each happened.

WHAT WAS SAID
  --exchanges FILE, or -, writes a line of JSON for every request and answer, with who, how proved, how long and which faults, and
  no secret of anybody's; what is refused before it is a request (a broken CONNECT, an unknown path) is in the log. It works with
  --data, too. In a test: jq -e 'select(.operation=="register" and .answer.status==429)' exchanges.jsonl

IN CI
  A step builds touchmark, starts it behind an &, waits for the ready line and runs your tests; nothing is to be cleaned up. README.md
  has it for GitHub Actions and for GitLab:
    touchmark serve --ephemeral --seed ci --https 127.0.0.1:0 --mqtt 127.0.0.1:0 --ca-out ca.pem --json > ready.json &
    until grep -qs '"ready":true' ready.json; do kill -0 $! || exit 1; sleep 0.1; done
    ./run-firmware-tests "$(jq -r .mqtt ready.json)" ca.pem`,
}
