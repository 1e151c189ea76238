package main

import "github.com/spf13/cobra"

// Pages for who runs a service: how much it takes from whom, what may stand in front of it, and what it tells of itself.

var limitsTopic = &cobra.Command{
	Use:   "limits",
	Short: "How much one device, one address and all may ask of a service",
	Long: `A service keeps those who ask too much from hurting the others. Three rates, in requests per second; to register takes a device two
or three of them, with a TPM four:

                          default    at once    counted by
    --rate-per-device           1         20    registration ID and address
    --rate-per-address        500      5,000    address of the caller, IPv6 by /64
    --rate-per-scope        2,000     10,000    ID scope

  0 is no limit of that kind, --no-limits none at all. An emulator (serve --ephemeral) has no limits unless one is named.

WHAT A DEVICE SEES
  First it is put off: 202, "assigning", retry-after 5. No work is done, and every Azure SDK waits and asks again: the device loses
  five seconds. Only who goes on regardless, at five times the rate, reads 429. What cannot be put off, such as the challenge of a
  TPM, is 429 at once. Over MQTT a device may be turned away when it connects, with return code 3.

CONNECTIONS
  --max-connections (20,000) is what each door has open; who comes then waits. --max-connections-per-address (2,000) is what one
  address may have open, with a tenth as many new ones in a second; further ones are closed.

A FACTORY OR CARRIER BEHIND ONE ADDRESS (NAT)
  All its devices are one address. Reckon with three requests and one connection for each registration: 150 devices that come in a
  second from one address stay below 500 requests. For more, raise both:
    touchmark serve … --rate-per-address 2000 --rate-per-scope 4000 --max-connections-per-address 10000
  Behind a proxy of your own, have it tell whom it speaks for (touchmark help proxies): else all devices are one address.

LOAD
  touchmark load comes from one address, and 1,000 devices that come again and again come more often than once in a second: above
  some 150 a second it measures the limits. For the strength of a service start it with --no-limits, or higher rates; or let callers
  have many addresses of this machine:
    touchmark load --connection service/owner.connection --concurrency 20 --duration 30s
    touchmark load --connection service/owner.connection --rate 600 --devices 20000 --sources 50 --attestations symmetric,x509

QUOTAS
  A scope has a profile of quotas. "none" is no quotas, and what serve gives a scope that says nothing: who runs this service wants no
  limits of a price list. "azure" has the numbers of Azure DPS, to rehearse what clients do when they meet them: --quotas azure, for
  the first scope and for new ones. A scope keeps its profile until --quotas names another.

                                      Azure DPS     profile azure           profile none
    individual enrollments            1,000,000     1,000,000               the disk's
    registrations                     1,000,000     1,000,000               the disk's
    groups by X.509 certificate             100     100                     no limit
    groups by symmetric key      100, for ever      100                     no limit (from 17 groups on they are searched)
    CA certificates                          25     25                      no limit
    linked hubs                     50, for ever    50                      no limit
    operations a minute                   1,000     1,000 of a replica      no limit
    device registrations a minute         1,000     1,000 of a replica      --rate-per-scope
    polls of a device             5 in 10 s         5 in 10 s of a replica  --rate-per-device
    items of a bulk operation                10     10                      10: clients count on it
    message size                          96 KB     64 KiB of a device      64 KiB of a device

  Above a number of things 403 (403002) is the answer, for certificates 400; above a rate 429 (429001) with Retry-After: the seconds to the next full
  minute, or ten seconds. Things are counted when one is made: exactly while they are few. A million takes long to count, so then a
  count stands for some seconds, and replicas together may make that much more. Rates are counted by each replica: three let three
  times as much through.`,
}

var proxiesTopic = &cobra.Command{
	Use:   "proxies",
	Short: "A service behind proxies and load balancers",
	Long: `A service must know its callers' addresses, since limits count by them, and their certificates. Two flags say whom it believes:

    --trusted-proxy CIDR    for addresses. Again for more.
    --tls-proxy CIDR        for certificates: it ends the devices' TLS, and what it says in a header is who the device is.

  Who is named by neither is believed nothing, whatever it sends.

A PROXY THAT PASSES TLS ON: EVERY DOOR
  It begins each connection with a PROXY header of version 2. Devices' certificates arrive as they are: this is the better way.
  From a trusted address MQTT and AMQP take nothing without the PROXY header, health checks neither (version 2 has LOCAL for them).
  On the HTTPS port it may be left out, for proxies that speak HTTP. Name no network that devices come from, too.

A PROXY THAT ENDS TLS: THE HTTPS DOOR
  It speaks TLS to the service again, has no PROXY header, and names the caller in X-Forwarded-For. WebSockets go through it too. Devices
  with keys or TPMs need no more. For those with certificates the proxy hands them on, and is named by --tls-proxy:
    --trust-forwarded-client-cert            Client-Cert and Client-Cert-Chain (RFC 9440)
    --trust-forwarded-client-cert=envoy      X-Forwarded-Client-Cert, with Cert or Chain
  The proxy must ask clients for a certificate without judging it (the service does), have the proof that the client has its key,
  and take that header out of what clients send: else everybody is any device.

ENVOY, TLS PASSED ON: in the cluster of each door, with --trusted-proxy for its address
    transport_socket:
      name: envoy.transport_sockets.upstream_proxy_protocol
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport
        config: {version: V2}
        transport_socket:
          name: envoy.transport_sockets.raw_buffer
          typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer}
  Where Envoy ends TLS, its HTTP connection manager has these, and the service =envoy and --tls-proxy:
    forward_client_cert_details: SANITIZE_SET
    set_current_client_cert_details: {cert: true, chain: true}
    use_remote_address: true

NGINX, TLS ENDED, devices with keys or TPMs; its stream module sends version 1 of the PROXY header, which is not taken
    location / {
        proxy_pass https://10.0.0.7:8443;
        proxy_ssl_trusted_certificate /etc/nginx/touchmark-ca.pem;
        proxy_ssl_verify on;
        proxy_ssl_name dps.example.net;
        proxy_http_version 1.1;
        proxy_set_header Host dps.example.net;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $http_connection;
        proxy_set_header X-Forwarded-For $remote_addr;
        proxy_set_header Client-Cert "";
        proxy_set_header Client-Cert-Chain "";
    }
  The service: touchmark serve --data service --hostname dps.example.net --https :8443 --trusted-proxy 10.0.0.5 …

TRY IT
  touchmark serve … --exchanges - tells the address of every caller.`,
}

var monitoringTopic = &cobra.Command{
	Use:   "monitoring",
	Short: "Metrics, logs, traces, health, usage, and why a device was refused",
	Long: `WHY WAS THIS DEVICE REFUSED?
    touchmark diagnose pump-0001 --service service/owner.connection
  A refused device learns 401002 and nothing else. The service keeps what each device tried, with the reason: the last
  --attempts-per-device attempts of a device (10), its last success among them, for --attempts-retention (30 days; 0 keeps none). It
  says so in sentences, and what to do.
  Over the service API, with the right to read registrations:
    GET    /touchmark/diagnose/REGISTRATION-ID    what is known: enrollment, registration, attempts, explanation
    POST   /touchmark/diagnose/REGISTRATION-ID    the same, with certificates in PEM as the body, the device's first: would they do?
    DELETE /touchmark/diagnose/REGISTRATION-ID    forget its attempts (right to write registrations); it is in the audit record:
                                                  touchmark registration forget REGISTRATION-ID
    GET    /touchmark/groups/NAME/devices         by which key or CA of a group each of its devices was let in last (touchmark group roll-key)
    GET    /touchmark/attempts/TRACKING-ID        whose error was that? The device's log has the tracking ID, as has this one
  The same attempt within an hour is one entry that counts. Attempts are written every two seconds: a crash loses those, and other
  replicas see them that much later. A scope keeps the last 100,000 attempts of devices that proved themselves, as many refusals of
  devices that it knows, and 10,000 of names that nobody enrolled. Refusals from one address above 300, and one a second, are not
  kept, so that a flood pushes out nobody else's; touchmark_dps_attempts_lost_total counts them. What the limits put off or refuse
  is not among the attempts.

METRICS: serve --metrics 127.0.0.1:9464
    GET /metrics    OpenMetrics, and Prometheus' text. It is plain HTTP: for your own network, and not on the public doors.

    touchmark_dps_…                              Azure's metric
    attestation_attempts_total                   AttestationAttempts     scope, status, protocol, kind
    registration_attempts_total                  RegistrationAttempts    scope, hub, status
    device_assignments_total                     DeviceAssignments       scope, hub, substatus
    device_requests_total, …_duration_seconds                            operation, code
    service_requests_total, …_duration_seconds                           operation, code, api_version
    hub_requests_total, …_duration_seconds, hub_up                       hub, operation, code
    webhook_requests_total, …_duration_seconds                           code
    throttled_total                                                      api, limit
    objects                                                              scope, type; counted anew every 15 s at most
    certificate_expiry_timestamp_seconds                                 name: tls, tls issuer, issuer NAME, ca SCOPE/NAME
    store_duration_seconds, store_errors_total                           kind: view, update
    door_connections, door_handshakes_total                              door, result
    outbox_depth, attempts_lost_total

  No registration ID is ever a label; of scopes and of hubs the first hundred are told apart, the rest is "other". Each replica
  counts for itself since its start, as Prometheus wants it. hub_up of a hub that is unlinked goes when objects are counted next.
  Worth an alert: certificate_expiry_timestamp_seconds - time() < 14 * 86400; rate(store_errors_total) > 0; hub_up == 0; and a jump
  of attestation_attempts_total with status unauthorized.

HEALTH, on the listener of --metrics and, without details, at the HTTPS door:
    GET /healthz    200 while the process is alive: restart it when there is no answer
    GET /readyz     200 while the store answers, 503 else and from the signal to stop on: send callers elsewhere

LOGS: serve --log json, --log-level debug, --log-mask-addresses
  One record for each operation, on standard error. Those of Azure's categories have category: DeviceOperations (operation
  register, status, lookup, challenge) or ServiceOperations (enrollment.get, group.put, registration.query …), result (Success,
  ClientError, Failure), httpStatus, code, trackingId, durationMs, idScope, registrationId or objectType and objectId, apiVersion,
  protocol, remote; and of devices status, substatus, hub, group, proof, rule and reason. What succeeds and changes nothing (a
  device's poll) is at level debug. No key, token or query of a URL is ever in the log. --log-mask-addresses writes networks alone.

TRACES: serve --otlp-endpoint https://collector.example.net:4318
  Spans of every request of a device, of every operation, and of the calls of hubs, by OTLP over HTTP. OTEL_EXPORTER_OTLP_ENDPOINT
  and its neighbours count too (headers, certificates, timeouts). --otlp-ratio 0.01 sends one trace in a hundred. An operator's
  traceparent is continued; a device's is not.

USAGE
    touchmark usage --service service/owner.connection
    GET /touchmark/usage?from=2026-11-01&to=2026-11-30
  Calls by day, operation and result, and whether Azure would bill them: a device's registration and every call on enrollments, groups
  and registrations, but no polls, no management, none of touchmark's own. Azure does not say whether it bills what it refuses;
  it is reckoned here. Replicas add up. It is kept every ten seconds, and at the stop: a killed replica loses what it counted since.

SEVERAL REPLICAS
  Metrics, rates and health are each replica's own. Usage, attempts and counts of objects are the store's: every replica tells the same.`,
}
