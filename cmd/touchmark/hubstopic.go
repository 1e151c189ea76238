package main

import "github.com/spf13/cobra"

// The page for who links hubs. Its steps for Mosquitto are tried by TestHubsExample.

var hubsTopic = &cobra.Command{
	Use:   "hubs",
	Short: "Linked hubs: kinds, connection strings, rights, and what moves",
	Long: `A linked hub is where devices go after they have registered. The service tells it of each device that it assigns to it, before the
device hears of its hub. Devices are told the hub's name; how the service reaches it is its connection string:

  record     Nothing is told: another system makes the devices known. No connection string.
  azure      Azure IoT Hub, or what speaks its registry and twin REST (api-version 2021-04-12).
               HostName=hub.example.net;SharedAccessKeyName=NAME;SharedAccessKey=BASE64
  builtin    The development hub of touchmark, which speaks the same, and has the same connection string.
  mosquitto  Eclipse Mosquitto 2 with its dynamic security plugin.
               HostName=mq.example.net;Username=NAME;Password=TEXT
               HostName=mq.example.net;Certificate=BASE64;Key=BASE64
  webhook    Any system of your own: one HTTPS call for each change.
               URL=https://back.example.net/touchmark;Secret=BASE64

CONNECTION STRINGS
  Members are in any order, their names in any letter case; a value has no ";" and no white space. Further members:
    Port=      unless it is 443, or 8883 for mosquitto; or HostName=HOST:PORT
    CA=        base64 of the PEM certificates that the hub's is judged by, instead of those of the system: base64 -w0 ca.pem
    Plain=true mosquitto without TLS (port 1883), a webhook by http: to loopback addresses, and nowhere else
  Certificate and Key are base64 of PEM too. No member is the path of a file: who may link a hub may not for that read this
  machine's files, and all replicas must reach the hub. SharedAccessKey and Secret are 16 to 64 octets: openssl rand -base64 32
  Strings are kept encrypted, and shown with **** for SharedAccessKey, Password, Key, Secret and the query of a URL. Who sends
  **** back keeps what is stored, as long as host, port, user and CA are as they were; else the secret must be given again.

RIGHTS THAT ARE NEEDED
  azure      a shared access policy with RegistryWrite and ServiceConnect (iothubowner has more)
  mosquitto  a client that may publish, receive and subscribe $CONTROL/dynamic-security/#, and no other topic

WHAT A HUB IS TOLD
  A new device is created. One that is there gets the credentials, the edge capability and the parent that it has now, where these
  differ; nothing else of it is touched, and one that an operator has disabled at the hub stays disabled. Devices with keys or a TPM have
  both keys, those with certificates the SHA-256 thumbprint in both places. An ID may be told twice: it is one device.
  Throttling, overload, timeouts and lost connections are tried again. After five calls without an answer a hub is left alone for a
  second, then longer, up to a minute; other hubs do not wait for it. touchmark hub outbox shows what each has yet to be told:
  touchmark help allocation.

WHAT MOVES ON REPROVISIONING, from the former hub to the next
                                  azure, builtin     mosquitto     webhook            record
    ID, credentials               yes                yes           yes                another system's
    edge capability, parent       yes                kept, unused  yes                another system's
    tags, desired properties      yes, with migrate  no            as it answers      no
    reported properties           no: no hub lets them be written from outside
    removal at the former hub     yes                yes           yes                another system's

LINKING ONE
    touchmark hub link --connection-string-file broker.connection --kind mosquitto --management service/management.connection
    touchmark hub link records.example.net --kind record --management service/management.connection
  serve --hub NAME links one of kind record, and --hub builtin the built-in one, for as long as the service is started so.

MOSQUITTO
  A device with a key has its ID for user name and MQTT client ID; its password is its primary key, as base64. A device with a
  certificate is let in by the broker itself: the certificate's chain ends at cafile, its common name is the device ID. So they need
  two listeners. The broker compares no thumbprints; and who has a certificate with the name of the administrator is the
  administrator: give clients that are no devices names that no device has, with a / in them. Each device has a role of its own, touchmark:ID, by which it may publish, subscribe and receive
  devices/ID/#, and nothing else; further roles may be given to it. A device that the service does not know is refused, and one with a
  certificate may do nothing. When credentials change or a device is removed, the broker puts it off. IDs have no + # / %.
  There are no twins. To bar a device that has a key, disable its client. One that has a certificate is not barred by that alone,
  until it registers again: take its role away, or remove it. Clients that are not of the service's making, by their text
  description, are never touched.
  The plugin writes all it has to its file at each change: good for some thousands of devices, not for a million.

  Step by step, with ca.pem (the devices' root, and the broker's), server.pem, server.key, and a password for its administrator in
  admin.password, all in /etc/mosquitto. Its conf.d/touchmark.conf:

    per_listener_settings false
    allow_anonymous false
    set_tcp_nodelay true
    plugin /usr/lib/x86_64-linux-gnu/mosquitto_dynamic_security.so
    plugin_opt_config_file /etc/mosquitto/dynamic-security.json
    # for devices with keys, and for the service
    listener 8883
    cafile /etc/mosquitto/ca.pem
    certfile /etc/mosquitto/server.pem
    keyfile /etc/mosquitto/server.key
    # for devices with certificates
    listener 8884
    cafile /etc/mosquitto/ca.pem
    certfile /etc/mosquitto/server.pem
    keyfile /etc/mosquitto/server.key
    require_certificate true
    use_identity_as_username true

  Then, as root:

    cd /etc/mosquitto
    mosquitto_ctrl dynsec init dynamic-security.json service/admin  # asks for that password
    chown mosquitto: dynamic-security.json
    systemctl restart mosquitto
    mkdir -m 700 admin                                             # instead of -o, which 2.0.11 does not heed
    printf '%s\n' '-h localhost' '-p 8883' '--cafile ca.pem' '-u service/admin' "-P $(cat admin.password)" > admin/mosquitto_ctrl
    ctl() { XDG_CONFIG_HOME=admin mosquitto_ctrl dynsec "$@"; }
    ctl createRole provisioning
    for may in publishClientSend publishClientReceive subscribePattern; do
      ctl addRoleACL provisioning $may '$CONTROL/dynamic-security/#' allow
    done
    ctl createClient service/dps                                   # asks for its password
    ctl addClientRole service/dps provisioning

  The connection string: HostName=BROKER;Username=service/dps;Password=…;CA=$(base64 -w0 ca.pem)
  A device of it:
    mosquitto_pub -h BROKER -p 8883 --cafile ca.pem -i ID -u ID -P KEY -t devices/ID/events -m hello

WEBHOOK
  Each call is a POST of JSON. Touchmark-Signature: t=SECONDS,v1=HEX is the HMAC-SHA256 under Secret of "SECONDS." and the body:
  compare it before you read on, and refuse what is older than five minutes. Idempotency-Key names the call; one that comes again by the
  network's doing has the same. A call that the service makes again has another: do everything so that twice is once.

    {"version":1, "operation":"check",     "hub":"NAME"}                              {"version":1}
    {"version":1, "operation":"admit",     "hub":"NAME", "deviceId":"ID", "device":D} {"version":1, "created":true or false}
    {"version":1, "operation":"remove",    "hub":"NAME", "deviceId":"ID"}             {"version":1}
    {"version":1, "operation":"device",    "hub":"NAME", "deviceId":"ID"}             {"version":1, "device":D}, without keys
    {"version":1, "operation":"twin",      "hub":"NAME", "deviceId":"ID"}             {"version":1, "twin":T}
    {"version":1, "operation":"mergeTwin", "hub":"NAME", "deviceId":"ID", "twin":T}   {"version":1}

    D: {"deviceId":"ID", "disabled":false, "iotEdge":false, "keys":{"primaryKey":"BASE64", "secondaryKey":"BASE64"} or
        "thumbprints":["HEX", "HEX"], "parent":"SCOPE", "scope":"SCOPE", "registrationId":"ID", "group":"GROUP"}; what is empty is left
        out. disabled counts when the device is created; admit has no scope, which the hub makes for edge devices.
    T: {"tags":{…}, "desired":{…}}; members that are null go away. A hub without twins answers "twin":{}.

  Answers are 2xx with exactly that, of at most 256 KiB, or another status, with {"version":1, "error":{"code":"…", "message":"…"}}.
  A device that is not there is 404 with the code DeviceNotFound. 408, 429 (with Retry-After) and 5xx are tried again; all else is
  not.`,
}
