package main

import "github.com/spf13/cobra"

var managementTopic = &cobra.Command{
	Use:   "management",
	Short: "Managing provisioning services with Azure's management clients",
	Long: `touchmark serve answers Azure Resource Manager's calls for provisioning services on its HTTPS port, below /subscriptions and
/providers: Microsoft.Devices/provisioningServices, api-version 2022-02-05 and any other date. One process has as many services as
you create; each has its own ID scope, hubs, policies, certificates and rules.

WHERE IT IS, AND WHO MAY
  serve writes management.connection into its data directory, for its owner's eyes alone:
    Endpoint=https://HOST:PORT;Token=TOKEN;Subscription=ID;ResourceGroup=NAME
  The token (management.token) may everything. To have another one, delete the file and start again. Every call is
    Authorization: Bearer TOKEN
  and every change, and every look at keys, is in the audit record of the service, with who, from where and when.

NAMES
  Subscription and resource group are kept and compared, and mean nothing else: any will do. The first service is in subscription
  00000000-0000-0000-0000-000000000000, resource group touchmark, location global. Names of services are unique in the whole
  process. ID scopes are 0ne and 8 hex digits, made by chance, and never anybody else's again.

AZURE'S CLIENTS
  Go       cloud.Configuration{Services: map[cloud.ServiceName]cloud.ServiceConfiguration{cloud.ResourceManager: {Endpoint: "https://HOST",
           Audience: "touchmark"}}, ActiveDirectoryAuthorityHost: "https://HOST"}, arm.ClientOptions.DisableRPRegistration, and a
           TokenCredential that returns the token.
  Node     new IotDpsClient({getToken: async () => ({token, expiresOnTimestamp})}, subscription, {endpoint, $host: endpoint,
           credentialScopes: "touchmark/.default"}), with NODE_EXTRA_CA_CERTS=service/ca.pem
  curl     curl --cacert service/ca.pem -H "Authorization: Bearer $(cat service/management.token)" \
             "https://HOST/subscriptions/SUB/providers/Microsoft.Devices/provisioningServices?api-version=2022-02-05"
  az       az cloud register --name plant --endpoint-resource-manager https://HOST/ … names the endpoint. az logs in at an identity
           provider first, which touchmark is not. Without a login: az rest --skip-authorization-header --headers
           "Authorization=Bearer TOKEN" --url https://HOST/…  (az has not been tried against this release.)

WHAT A PUT DOES
  It replaces hubs, IP rules, allocation policy and public network access: what it leaves out is gone. Policies that are left out
  stay, as do private endpoint connections and what stands under properties.touchmark. Read, change, write back: keys that were shown
  as **** are put back as they were, for the same host and policy and no other.
  Hubs that serve --hub names are linked again at each start; one that you change here stays as you changed it.
  A hub that does not answer is not linked (401001), but with ?skipHubCheck=true (hub link --unchecked), or under serve --no-hub-check. Hubs
  have a member of ours, kind: azure without it; builtin; mosquitto (HostName=H;Username=U;Password=P), webhook (URL=https://…;
  Secret=BASE64), or record, with a name alone. touchmark hub link --kind does that.
  properties.touchmark is ours too: {"strictRoots": true, "quotas": "azure"}; touchmark scope update --strict-roots --quotas azure.
  Refused, since there is nothing behind them: managed identities, disableLocalAuth, SKUs other than S1, capacity other than 1.

CERTIFICATES
  PUT …/certificates/NAME takes PEM or DER in base64. It is verified with "isVerified": true, which is your word, or by proof of
  possession: generateVerificationCode, a certificate with that code as its common name signed by the CA, verify. Enrollment groups
  name certificates by caReferences. One that is not verified any more, or was deleted, lets nobody in through its group, at once.
  Intermediates in a group's signingCertificates count by themselves. With strictRoots they count only where the chain goes on to a
  verified certificate of the service, as in Azure; devices, or --intermediate, bring what is between.

IP RULES AND PUBLIC NETWORK ACCESS
  The first rule that matches decides, for target all, serviceApi or deviceApi; without a match the caller is let in, so end with
  reject-all rules, one for 0.0.0.0/0 and one for ::/0. Up to 100 rules, IPv4 and IPv6. Who is kept out reads 401 and no more; the log says
  which rule it was. With publicNetworkAccess Disabled the rules do not count: loopback gets in, and the networks of
    touchmark serve --private-network 10.0.0.0/8 --private-network fd00::/8
    touchmark scope update plant-a --ip-rule 'plant=accept 10.8.0.0/16 device' --ip-rule 'nobody=reject 0.0.0.0/0' --ip-rule 'nobody 6=reject ::/0'
    touchmark scope update plant-a --ip-rule 'office=accept 192.0.2.0/24 service' --ip-rule-before nobody
    touchmark scope update plant-a --remove-ip-rule office
  The address is the caller's own, also behind proxies that are named (touchmark help proxies); behind one that is not, everybody
  has the proxy's, and a proxy on this machine is loopback. The management API is not filtered: you could lock yourself out.

PRIVATE ENDPOINTS
  Connections are kept and shown as they were put, and do nothing: there is no private network that this program could make.

DELETING
  DELETE lets nobody in from then on, and removes all that is kept of the service: enrollments, registrations, devices, keys, the audit
  record. Hubs are not told: devices stay what they are there. What takes longer than a moment goes on (202, Azure-AsyncOperation),
  over restarts too. Left is the ID scope, with the name and the place that the service had, encrypted, so that the ID is not given
  out again.
  In a store in a file, what was deleted is overwritten at once. Then the file is written anew, if it has up to 256 MiB, and nothing of
  it is left there; a larger file may keep fragments of rows, until it is backed up and restored. Backups, and copies that a disk or a
  file system keeps, are yours to delete. In PostgreSQL rows are deleted, and VACUUM and the write-ahead log are the database's.
  The first service is not deleted here: it goes with its data directory. It can be erased.

ERASING, AND KEEPING THE SERVICE
  POST …/provisioningServices/NAME/erase is ours, with the right to write services; touchmark scope erase does that. It removes
  enrollments, groups, registrations, attempts, what bundles said of devices, orders and refusals, certificates that were issued or
  uploaded, what hubs have yet to be told, and the audit record, which begins anew with who erased it. What stays are name, ID scope, tags,
  hubs, policies with their keys, rules, quotas and counts of usage. Nobody is let in until it is done (state Transitioning); it is as
  long an operation as a deletion is, goes on over restarts, and reaches as far into files. Hubs are not told, the built-in one neither.
  An import that is under way is cut off. Identities that were scrapped are forgotten with the rest: only their enrollments, which are
  gone as well, let devices in.`,
}
