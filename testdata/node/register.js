// Registers a stamped device with Azure's own SDK and prints what came of it as one line of JSON.
// usage: node register.js STAMP-DIRECTORY https|mqtt|mqtt-ws|amqp|amqp-ws HOST[:PORT]
'use strict';
const fs = require('fs');
const path = require('path');
const { ProvisioningDeviceClient } = require('azure-iot-provisioning-device');

const [stampDir, protocol, host] = process.argv.slice(2);
const stamp = JSON.parse(fs.readFileSync(path.join(stampDir, 'provisioning.json'), 'utf8'));
const beside = (name) => fs.readFileSync(path.join(stampDir, name), 'utf8');
const Transport = {
  'https': () => require('azure-iot-provisioning-device-http').Http,
  'mqtt': () => require('azure-iot-provisioning-device-mqtt').Mqtt,
  'mqtt-ws': () => require('azure-iot-provisioning-device-mqtt').MqttWs,
  'amqp': () => require('azure-iot-provisioning-device-amqp').Amqp,
  'amqp-ws': () => require('azure-iot-provisioning-device-amqp').AmqpWs,
}[protocol]();

let security;
if (stamp.attestation === 'x509') {
  const { X509Security } = require('azure-iot-security-x509');
  security = new X509Security(stamp.registrationId, { cert: beside(stamp.certificateChain), key: beside(stamp.privateKey) });
} else {
  const { SymmetricKeySecurityClient } = require('azure-iot-security-symmetric-key');
  security = new SymmetricKeySecurityClient(stamp.registrationId, stamp.symmetricKey);
}

const client = ProvisioningDeviceClient.create(host, stamp.idScope, new Transport(), security);
client.register((err, result) => {
  if (err) {
    console.log(JSON.stringify({ ok: false, name: err.name || err.condition, message: err.message || err.description, result: err.result }));
    process.exit(1);
  }
  console.log(JSON.stringify({ ok: true, status: result.status, assignedHub: result.assignedHub, deviceId: result.deviceId }));
  process.exit(0);
});
