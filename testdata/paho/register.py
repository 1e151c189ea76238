# Registers a stamped device with Paho, a plain MQTT client that knows nothing of provisioning, and prints what came of it
# as one line of JSON. usage: register.py STAMP-DIRECTORY mqtt|mqtt-ws HOST PORT CA-FILE
import base64, hashlib, hmac, json, os, queue, sys, time, urllib.parse
import paho.mqtt.client as paho

stamp_dir, protocol, host, port, ca = sys.argv[1:]
with open(os.path.join(stamp_dir, "provisioning.json")) as f:
    stamp = json.load(f)
device = stamp["registrationId"]
user = f"{stamp['idScope']}/registrations/{device}/api-version=2019-03-31&ClientVersion=paho"
client = paho.Client(client_id=device, protocol=paho.MQTTv311, transport="websockets" if protocol == "mqtt-ws" else "tcp")
if protocol == "mqtt-ws":
    client.ws_set_options(path="/$iothub/websocket")
password = None
if stamp["attestation"] == "x509":
    client.tls_set(ca, os.path.join(stamp_dir, stamp["certificateChain"]), os.path.join(stamp_dir, stamp["privateKey"]))
else:
    client.tls_set(ca)
    resource = urllib.parse.quote(f"{stamp['idScope']}/registrations/{device}", safe="")
    expiry = int(time.time()) + 3600
    mac = hmac.new(base64.b64decode(stamp["symmetricKey"]), f"{resource}\n{expiry}".encode(), hashlib.sha256).digest()
    password = f"SharedAccessSignature sr={resource}&sig={urllib.parse.quote(base64.b64encode(mac), safe='')}&se={expiry}"
client.username_pw_set(user, password)

events = queue.Queue()
client.on_connect = lambda c, u, flags, rc: events.put(("connected", rc, flags["session present"]))
client.on_subscribe = lambda c, u, mid, granted: events.put(("subscribed", granted))
client.on_message = lambda c, u, m: events.put(("message", m.topic, m.payload, m.qos))


def wait(kind):
    event = events.get(timeout=20)
    if event[0] != kind:
        raise RuntimeError(f"{event} instead of {kind}")
    return event[1:]


def finish(result):
    print(json.dumps(result), flush=True)
    client.disconnect()
    client.loop_stop()
    sys.exit(0 if result["ok"] else 1)


client.connect(host, int(port))
client.loop_start()
code, present = wait("connected")
if code or present:
    finish({"ok": False, "connack": code, "sessionPresent": present})
client.subscribe("$dps/registrations/res/#", qos=1)
if wait("subscribed") != ((1,),):
    finish({"ok": False, "message": "the subscription was refused"})
topic, body = "$dps/registrations/PUT/iotdps-register/?$rid=1", json.dumps({"registrationId": device})
while True:
    client.publish(topic, body, qos=1).wait_for_publish(20)
    topic, payload, qos = wait("message")
    answer = json.loads(payload.decode("ascii"))
    status, query = topic.removeprefix("$dps/registrations/res/").split("/?")
    if status == "200":
        state = answer["registrationState"]
        finish({"ok": answer["status"] == "assigned", "status": answer["status"], "assignedHub": state.get("assignedHub"), "deviceId": state.get("deviceId")})
    if status != "202" or qos != 1:
        finish({"ok": False, "message": f"{status} at QoS {qos}", "result": answer})
    if not query.endswith("&retry-after=3"):
        finish({"ok": False, "message": topic})
    topic, body = f"$dps/registrations/GET/iotdps-get-operationstatus/?$rid=2&operationId={answer['operationId']}", " "
