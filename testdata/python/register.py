# Registers a stamped device with Azure's own SDK for Python and prints what came of it as one line of JSON.
# usage: register.py STAMP-DIRECTORY mqtt|mqtt-ws HOST CA-FILE [PAYLOAD]
import json, os, sys
from azure.iot.device import ProvisioningDeviceClient, X509
from azure.iot.device.exceptions import ClientError

stamp_dir, protocol, host, ca = sys.argv[1:5]
with open(os.path.join(stamp_dir, "provisioning.json")) as f:
    stamp = json.load(f)
with open(ca) as f:
    common = dict(provisioning_host=host, registration_id=stamp["registrationId"], id_scope=stamp["idScope"], websockets=protocol == "mqtt-ws", server_verification_cert=f.read())
if stamp["attestation"] == "x509":
    certificate = X509(os.path.join(stamp_dir, stamp["certificateChain"]), os.path.join(stamp_dir, stamp["privateKey"]))
    client = ProvisioningDeviceClient.create_from_x509_certificate(x509=certificate, **common)
else:
    client = ProvisioningDeviceClient.create_from_symmetric_key(symmetric_key=stamp["symmetricKey"], **common)
if len(sys.argv) > 5:
    client.provisioning_payload = json.loads(sys.argv[5])
try:
    r = client.register()
except ClientError as e:
    print(json.dumps({"ok": False, "name": type(e).__name__, "message": f"{e}: {e.__cause__}"}))
    sys.exit(1)
print(json.dumps({"ok": r.status == "assigned", "status": r.status, "assignedHub": r.registration_state.assigned_hub, "deviceId": r.registration_state.device_id}))
