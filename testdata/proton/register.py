# Registers a stamped device with Qpid Proton, a plain AMQP 1.0 client that knows nothing of provisioning, and prints what came
# of it as one line of JSON. usage: register.py STAMP-DIRECTORY plain|external|bare|anonymous HOST PORT CA-FILE
import base64, hashlib, hmac, json, os, sys, time, urllib.parse, uuid
from proton import Message, SSLDomain, int32, symbol
from proton.handlers import MessagingHandler
from proton.reactor import AtLeastOnce, Container, LinkOption

stamp_dir, how, host, port, ca = sys.argv[1:]
with open(os.path.join(stamp_dir, "provisioning.json")) as f:
    stamp = json.load(f)
device = stamp["registrationId"]
address = f"{stamp['idScope']}/registrations/{device}"
tls = SSLDomain(SSLDomain.MODE_CLIENT)
tls.set_trusted_ca_db(ca)
tls.set_peer_authentication(SSLDomain.VERIFY_PEER_NAME)
options = {"heartbeat": 20, "sasl_enabled": how != "bare"}
if how == "plain":
    resource = urllib.parse.quote(address, safe="")
    expiry = int(time.time()) + 3600
    mac = hmac.new(base64.b64decode(stamp["symmetricKey"]), f"{resource}\n{expiry}".encode(), hashlib.sha256).digest()
    options["user"] = address
    options["password"] = f"SharedAccessSignature sr={resource}&sig={urllib.parse.quote(base64.b64encode(mac), safe='')}&se={expiry}"
if how in ("external", "bare"):
    tls.set_credentials(os.path.join(stamp_dir, stamp["certificateChain"]), os.path.join(stamp_dir, stamp["privateKey"]), None)
if how != "bare":
    options["allowed_mechs"] = how.upper()


class Version(LinkOption):
    def apply(self, link):
        link.properties = {symbol("com.microsoft:api-version"): "2019-03-31", symbol("com.microsoft:client-version"): "proton"}


class Device(MessagingHandler):
    def __init__(self):
        super().__init__(auto_accept=True)
        self.correlation = str(uuid.uuid4())
        self.result = None

    def on_start(self, event):
        self.connection = event.container.connect(f"amqps://{host}:{port}", ssl_domain=tls, reconnect=False, **options)
        event.container.create_receiver(self.connection, address, options=[AtLeastOnce(), Version()])
        self.sender = event.container.create_sender(self.connection, address, options=[AtLeastOnce(), Version()])
        self.asked = False

    def ask(self, **properties):
        self.sender.send(Message(body=json.dumps({"registrationId": device}).encode(), inferred=True, correlation_id=self.correlation, properties=properties))

    def on_sendable(self, event):
        if not self.asked:
            self.asked = True
            self.ask(**{"iotdps-operation-type": "iotdps-register", "iotdps-forceRegistration": False})

    def on_message(self, event):
        m = event.message
        answer = json.loads(bytes(m.body).decode("ascii"))
        if m.correlation_id != self.correlation:
            self.finish({"ok": False, "message": f"correlation {m.correlation_id!r}"})
        elif answer["status"] == "assigning":
            hints = (m.properties or {}).get("retry-after"), (m.properties or {}).get("Retry-After")
            if hints != (3, 3) or type(hints[0]) is not int32:
                return self.finish({"ok": False, "message": f"hints {hints!r}"})
            self.ask(**{"iotdps-operation-type": "iotdps-get-operationstatus", "iotdps-operation-id": answer["operationId"]})
        else:
            state = answer["registrationState"]
            self.finish({"ok": answer["status"] == "assigned", "status": answer["status"], "assignedHub": state.get("assignedHub"), "deviceId": state.get("deviceId")})

    def finish(self, result):
        self.result = self.result or result
        self.connection.close()

    def refused(self, what, condition):
        description = condition.description if condition else None
        try:
            document = json.loads(description)
        except (TypeError, ValueError):
            document = None
        self.finish({"ok": False, "name": condition.name if condition else what, "message": f"{what}: {description}", "result": document})

    def on_rejected(self, event):
        self.refused("rejected", event.delivery.remote.condition)

    def on_link_error(self, event):
        self.refused("detach", event.link.remote_condition)

    def on_session_error(self, event):
        self.refused("end", event.session.remote_condition)

    def on_connection_error(self, event):
        self.refused("close", event.connection.remote_condition)

    def on_transport_error(self, event):
        self.refused("transport", event.transport.condition)


handler = Device()
Container(handler).run()
print(json.dumps(handler.result))
sys.exit(0 if handler.result and handler.result["ok"] else 1)
