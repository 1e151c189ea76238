package main

import "github.com/spf13/cobra"

// Two pages for who runs a service for others: who may do what, and how tenants are kept apart.

var accessTopic = &cobra.Command{
	Use:   "access",
	Short: "Who may do what at a service: policies, providers, the audit record",
	Long: `Operators prove themselves in one of three ways: with a key of a shared access policy, with a token of an identity provider, or with
the management token. Devices have nothing to do with any of them.

RIGHTS
    ServiceConfig             policies and the audit record
    EnrollmentRead            read and query enrollments and groups, without keys
    EnrollmentWrite           create, change and delete them, import bundles, read their keys; has all of the others but ServiceConfig in it
    RegistrationStatusRead    what became of devices, and of production orders
    RegistrationStatusWrite   delete registrations
    DeviceConnect             kept and shown, and good for nothing here
  A policy has some of these. An identity provider can also give:
    AttestationDetails        read the keys of enrollments, and nothing else
    ManagementRead, ManagementWrite, ManagementKeys
                              read and change provisioning services, hubs and certificates; list the keys of policies

CONNECTION STRINGS
  HostName=HOST;SharedAccessKeyName=POLICY;SharedAccessKey=KEY is what all of Azure's tools take. The first start writes the owner's
  into owner.connection in the data directory: it may everything in that scope. Who needs less gets a policy with less:
    touchmark policy create line-3 --rights EnrollmentRead,RegistrationStatusRead
  A token is good for the one host that it names, and for five minutes longer than it says. Keep the file at mode 0600.

ROTATION
  Each policy has two keys, and either is good. Move everybody to the secondary key, make a new primary one, move everybody back, make a
  new secondary one:
    touchmark policy roll-key line-3 --key primary --yes
  What was signed with the old key is refused at once. A start never changes keys that are there.

IDENTITY PROVIDERS (OpenID Connect)
  touchmark serve … --oidc provider.toml takes bearer tokens that a provider signed: Keycloak, Entra ID, Dex, Google and others.

    issuer = "https://login.example.net/realms/plant"   # as its tokens have it in iss, to the letter
    audience = "touchmark"                              # what they must have in aud
    # keys = "https://…"      where its public keys are; else its discovery document says
    # ca = """-----BEGIN …""" roots for its TLS certificate; else the system's

    [[roles]]
    claim = "roles"                   # a list, a text, or words in a text; realm_access.roles descends
    value = "dps-operator"
    scope = "plant-a"                 # name of a provisioning service, or "*" for every one
    rights = "EnrollmentWrite, ServiceConfig"

  Signatures of RSA (2048 bits and more), ECDSA and Ed25519 count, never shared secrets. exp and sub must be there; clocks may differ by
  a minute. Keys are fetched when they are needed, again each hour, and for a name that is not known at most every ten seconds. When the
  provider is away the keys that are known count for a day. A token whose claims have no role may nothing. To try a token:
    curl --cacert ca.pem -H "Authorization: Bearer $TOKEN" 'https://HOST/touchmark/info?api-version=2021-10-01'

FROM WHERE
  touchmark scope update --ip-rule says from which networks devices and operators may call a scope, and --public-network-access whether
  the public may at all; scope show has both. Help management says how they are judged.

THE MANAGEMENT TOKEN
  management.token in the data directory is a bearer token that may everything in every scope. Delete the file and start again to have
  another one. Replicas of one service each have their own, unless you give all the same file.

WHO WAS REFUSED, AND WHO DID WHAT
  A refused caller reads 401 and nothing else. The service's log says why, under the tracking ID of the answer. Every change, and every
  time that keys are shown, is in the audit record, which nobody can take an entry from:
    touchmark audit list --service service/owner.connection --since 24h`,
}

var scopesTopic = &cobra.Command{
	Use:   "scopes",
	Short: "Many tenants on one service: a scope for each, or a group for each",
	Long: `One touchmark serve is many provisioning services, each with an ID scope. Devices name the scope by its ID, at the one global
endpoint; operators name it by its host. What belongs to one scope cannot be seen or used from another: enrollments, registrations,
hubs, policies, certificates, bundles, limits, the audit record.

A SCOPE FOR EACH TENANT
  When tenants must not see each other: customers, business units, test beside production. Each has its owner, its keys, its hubs.
    touchmark serve --data service --domain dps.example.net
    touchmark scope create plant-b --management service/management.connection
    touchmark scope show plant-b --management service/management.connection
  Operators of plant-b call plant-b.dps.example.net, with a policy of its own. touchmark policy show provisioningserviceowner
  --scope plant-b --show-keys prints its connection string: put it into a file of mode 0600, with the service's ca.pem beside it. Its
  devices get its ID scope, and nothing else differs:
    touchmark init line-b --id-scope 0ne…
  DNS: *.dps.example.net has to lead to the service. Its own certificate is for that name too; one of yours (--tls-cert) has to be.
  Bundles for it are taken from stations in scopes/ID-SCOPE/trust of the data directory, in lower case. Keys in them are sealed to a
  recipient of its own, which GET /touchmark/info tells its operators: what is sealed to one scope opens in no other.
  Who may link hubs in a scope, or write its enrollments, has the service call hosts of their choosing. Where tenants do so themselves,
  start it with --tenants-public-only: hubs and webhooks of all scopes but the first are then called at public addresses alone, not on
  this machine or in your networks.
  Without --domain, all operators' calls are for the first scope, by whatever name of --hostname, localhost or address they come: one
  machine needs no DNS, and the other scopes' devices register, but nobody can call their service APIs.

ONE SCOPE, WITH AN INTERMEDIATE CA AND A GROUP FOR EACH TENANT
  When one team runs all of it, and tenants are lines, regions or products: one connection string, one set of hubs, and devices that are
  flashed before anybody knows whose they are.
    touchmark ca export --line tenant-b --which issuing > tenant-b.pem     each line has one; or sign one below your root for each
    touchmark group create tenant-b --certificate-path tenant-b.pem --allocation-policy static --iot-hubs hub-b.example.net
  The group of a device is that of the first certificate above it that has one, so the tenant follows from who signed it. To move a
  device to another tenant sign it anew; to stop a tenant, disable its group: its root's group does not let it in.

WHICH?
                                      a scope each                       a group each
    Operators kept apart              yes, by host, policy and key       no: rights are for the whole scope
    Device needs to know its tenant   yes, as its ID scope               no: its certificate says so
    The same registration ID twice    yes, once in each                  no
    Hubs                              of its own                         of the scope, named by the group
    Limits and usage                  counted for each                   counted together
    Deleting a tenant                 one command, everything goes       delete the group; registrations stay, and are listed
    How many                          thousands                          thousands of CAs; of symmetric keys some hundreds

ERASING A TENANT
    touchmark scope delete plant-b --management service/management.connection        all of it; its name is free, its ID scope never is
    touchmark scope erase plant-a --management service/management.connection         all of its devices; the scope goes on
  The first scope cannot be deleted, since the service stands on it: it is erased. A tenant that is a group is erased device by device:
  touchmark registration list GROUP shows them, touchmark help operating how.

  A right that an identity provider gives is in the scopes that the role names: touchmark help access.`,
}
