package main

import "github.com/spf13/cobra"

// allocationTopic is for operators who link more than one hub.
var allocationTopic = &cobra.Command{
	Use:   "allocation",
	Short: "Which hub a device gets, then and when it comes again",
	Long: `The enrollment's allocationPolicy decides, or the scope's, or hashed. It chooses among the enrollment's iotHubs, or all linked hubs;
one with applyAllocationPolicy false is chosen only by who names it.

  hashed      By weight (allocationWeight, 1 to 1000): each hub has its share, a device has the same hub every time, and a hub that
              comes, goes or changes its weight moves its own devices and no others.
  static      The hub that the enrollment names, or the only one that is linked. A named hub that is not linked: failed, 400208.
  geoLatency  The nearest hub by --latency-table; hashed among equals, and where the table knows nothing.
  custom      A webhook of yours chooses. For enrollments and groups, not for a scope.

LATENCY TABLE
  From the network of the device's address (behind proxies: touchmark help proxies) to the locations of linked hubs, in milliseconds;
  the longest network counts. TOML, or CSV with the lines network,location,milliseconds:

    [networks]
    "10.8.0.0/16" = "berlin"
    "2001:db8:7::/48" = "berlin"
    [latency.berlin]
    westeurope = 14
    eastus = 98

WEBHOOK
  The contract is that of Azure's custom allocation: the function that you have works. It is posted JSON with individualEnrollment or
  enrollmentGroup (no keys), deviceRuntimeContext (registrationId, currentIotHubHostName, x509, symmetricKey or tpm, the payload that the
  device sent) and linkedHubs, at every registration; it answers with one of linkedHubs:

    import http.server, json
    class Allocate(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            ask = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            model = (ask["deviceRuntimeContext"].get("payload") or {}).get("model", "")
            hubs = [h for h in ask["linkedHubs"] if h.startswith(model)] or ask["linkedHubs"]
            body = json.dumps({"iotHubHostName": hubs[0], "payload": {"model": model}}).encode()
            self.send_response(200); self.end_headers(); self.wfile.write(body)

  initialTwin in the answer goes before the enrollment's; payload, an object, goes to the device and into its record. Anything but 2xx
  with a linked hub fails the registration: 400207, "Custom allocation failed with status code: N" (408: no answer; 400: an answer that is
  none). The device registers again. A key in the URL (?code=…) is kept, and shown as ?****.

  Timeout     Five seconds to connect, ten for everything. The device is "assigning" meanwhile.
  Retries     None, since the device registers again; --webhook-retries N calls again at once, up to 3 times within the ten seconds,
              where there is no answer or 5xx. The function may be asked twice for one registration then.
  Breaker     After five calls to one URL in a row without an answer, or with 5xx, it is not called for a second, then longer, up to a
              minute: registrations fail at once meanwhile (408). One call then tells whether it is back.
  Signature   With --webhook-secret-file FILE (openssl rand -base64 32 > FILE) each call has Touchmark-Signature: t=SECONDS,v1=HEX, the
              HMAC-SHA256 under the secret's octets of SECONDS, a full stop and the body. Refuse what is older than some minutes.
  TLS         The system's CAs judge the webhook's certificate, or those in --webhook-ca FILE instead of them.
  Secret and CA are the first scope's. Webhooks of other scopes are called without a signature and by the system's CAs: it is their
  tenants who choose where they stand and what devices say to them, and signatures for those would be good at yours. For the same reason
  who may write the first scope's enrollments must be trusted with the secret. --webhook-retries is for all. A key that a tenant's webhook
  asks for stands in its URL.

WHEN THE DEVICE COMES AGAIN (reprovisionPolicy)
  migrate     updateHubAssignment, migrateDeviceData. The hub is chosen anew. When it is another, the device is made there with its tags,
              desired properties, capabilities and status, and taken from the old one; then it is "assigned", deviceDataMigrated. What
              the device itself reported stays behind: no hub lets others write it.
  reset       updateHubAssignment alone. As above, with the enrollment's initial twin: deviceDataReset.
  never       Neither. It stays where it is; keys and certificates are brought up to date. The webhook is asked, among that one hub.
  none given  migrate; never for devices of api-version 2018-04-01 and older.
  A device's status at its hub is its operator's and stays. The initial twin is written to devices that are new to a hub, no others.
  A hub is called when it has something to learn, and when a device comes again within 15 minutes: it may be back because its hub does not
  know it any more. Deleting a registration record, or disabling an enrollment, changes nothing at a hub.

WHEN A HUB FAILS
  What hubs have to be told is in the store before they are told, so it survives every crash; a device is "assigning" meanwhile. What
  is refused for good fails the registration at once, and what time may heal after --hub-give-up (2m), with the hub's own words; what was
  made for it elsewhere is removed. An old hub that does not answer holds the device up for a quarter of that; it is asked for a week
  to remove the device, which is then an orphan, as it is at once where its hub was unlinked. Orphans stay listed until somebody has
  looked after them. touchmark hub outbox lists what hubs have yet to be told, with attempts and the last error; touchmark hub orphans
  list the orphans, and forget takes one off; touchmark diagnose says both of one device. Over the service API:
    GET /touchmark/outbox, GET /touchmark/orphans, DELETE /touchmark/orphans/REGISTRATION-ID?hub=HOST&deviceId=ID

NESTED EDGE
  "parent": "gateway-7" in an enrollment or a group (--parent, the column parent) puts its devices below that edge device
  (capabilities.iotEdge), named by registration ID or device ID. Children go to their parent's hub, whatever their policy says. Who comes first does not matter: a child
  is assigned without its parent and linked when the parent arrives. When the parent goes to another hub its children follow as they
  register again. Five levels, 100 children, no cycles. touchmark hub children gateway-7 (GET
  /touchmark/edges/gateway-7/children) lists them, and why one is not linked yet. Azure has no such member, so it does not go into
  portable bundles.`,
}
