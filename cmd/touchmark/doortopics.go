package main

import "github.com/spf13/cobra"

// Two pages for who runs a service: how much it takes from whom, and what may stand in front of it.

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
    touchmark load --connection service/owner.connection --rate 600 --devices 20000 --sources 50 --attestations symmetric,x509`,
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
