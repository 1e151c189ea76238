// Goes the whole way of a device with Azure's SDKs, unmodified: registers by its stamp, connects to the hub that it is told with the
// same credential, sends a message, reads its twin and takes a change of its desired properties, which azure-iothub makes where
// HUB_CONNECTION is set. Prints what came of it as one line of JSON.
// usage: [HUB_CONNECTION=…] node zerotouch.js STAMP-DIRECTORY mqtt|mqtt-ws HOST [HTTPS-PORT MQTT-PORT]
'use strict';
const fs = require('fs');
const path = require('path');
const { ProvisioningDeviceClient } = require('azure-iot-provisioning-device');
const provisioning = require('azure-iot-provisioning-device-mqtt');
const { MqttBase } = require('azure-iot-mqtt-base');
const { NoRetry } = require('azure-iot-common');
const { Client, Message } = require('azure-iot-device');
const { MqttWs } = require('azure-iot-device-mqtt');
const { Registry } = require('azure-iothub');

const [stampDir, protocol, host, httpsPort, mqttPort] = process.argv.slice(2);
const stamp = JSON.parse(fs.readFileSync(path.join(stampDir, 'provisioning.json'), 'utf8'));
const beside = (name) => fs.readFileSync(path.join(stampDir, name), 'utf8');
const { Mqtt, webSocketAgent } = require('./ports')(host, httpsPort || 443, mqttPort || 8883);
const webSocket = protocol === 'mqtt-ws';
const x509 = stamp.attestation === 'x509' && { cert: beside(stamp.certificateChain), key: beside(stamp.privateKey) };

function register() {
  let security;
  if (x509) {
    const { X509Security } = require('azure-iot-security-x509');
    security = new X509Security(stamp.registrationId, x509);
  } else {
    const { SymmetricKeySecurityClient } = require('azure-iot-security-symmetric-key');
    security = new SymmetricKeySecurityClient(stamp.registrationId, stamp.symmetricKey);
  }
  const base = new MqttBase();
  base.setOptions({ mqtt: { webSocketAgent } });
  const transport = webSocket ? new provisioning.MqttWs(base) : new provisioning.Mqtt(base);
  return ProvisioningDeviceClient.create(!webSocket && mqttPort ? `${host}:${mqttPort}` : host, stamp.idScope, transport, security).register();
}

(async () => {
  const { assignedHub, deviceId } = await register();
  const client = Client.fromConnectionString(`HostName=${assignedHub};DeviceId=${deviceId};` + (x509 ? 'x509=true' : `SharedAccessKey=${stamp.symmetricKey}`), webSocket ? MqttWs : Mqtt);
  client.setRetryPolicy(new NoRetry());
  await client.setOptions({ mqtt: { webSocketAgent }, ...x509 });
  await client.open();
  const message = new Message(JSON.stringify({ temperature: 21.5 }));
  message.contentType = 'application/json';
  await client.sendEvent(message);
  const twin = await client.getTwin();
  let desired;
  if (process.env.HUB_CONNECTION) {
    const told = new Promise((resolve) => twin.on('properties.desired.zerotouch', resolve));
    await client.getTwin(); // an answer behind the subscription's
    const registry = Registry.fromConnectionString(process.env.HUB_CONNECTION.replace(/(HostName=[^;:]*):\d+/, '$1'));
    await registry.updateTwin(deviceId, { properties: { desired: { zerotouch: Date.now() } } }, '*');
    desired = await told;
  }
  await new Promise((resolve, reject) => twin.properties.reported.update({ zerotouch: desired || true }, (e) => (e ? reject(e) : resolve())));
  await client.close();
  console.log(JSON.stringify({ ok: true, assignedHub, deviceId, desired }));
  process.exit(0);
})().catch((err) => {
  console.log(JSON.stringify({ ok: false, name: err.name, message: err.message, result: err.result }));
  process.exit(1);
});
