// Registers a device by its TPM with Azure's own SDK and prints what came of it as one line of JSON. The registration ID is the one
// that the SDK derives from the endorsement key.
// usage: node registertpm.js ID-SCOPE https|amqp|amqp-ws HOST[:PORT] TPM-PORT
'use strict';
const { ProvisioningDeviceClient } = require('azure-iot-provisioning-device');
const { TpmSecurityClient } = require('azure-iot-security-tpm');
const { Tpm } = require(require.resolve('tss.js', { paths: [require.resolve('azure-iot-security-tpm')] }));

const [idScope, protocol, host, port] = process.argv.slice(2);
const Transport = {
  'https': () => require('azure-iot-provisioning-device-http').Http,
  'amqp': () => require('azure-iot-provisioning-device-amqp').Amqp,
  'amqp-ws': () => require('azure-iot-provisioning-device-amqp').AmqpWs,
}[protocol]();

const tpm = new Tpm(true, '127.0.0.1', Number(port));
const security = new TpmSecurityClient('', tpm);
const client = ProvisioningDeviceClient.create(host, idScope, new Transport(), security);
client.register((err, result) => {
  if (err) {
    console.log(JSON.stringify({ ok: false, name: err.name || err.condition, message: err.message || err.description, result: err.result }));
    process.exit(1);
  }
  // The key for the hub is in the TPM by now, and signs.
  security.signWithIdentity(Buffer.from('hello, hub'), (err, signature) => {
    const state = result.registrationState; // for TPMs the SDK gives back the whole answer
    console.log(JSON.stringify({ ok: !err, message: err && err.message, status: result.status, assignedHub: state.assignedHub, deviceId: state.deviceId, signature: signature && signature.toString('base64') }));
    process.exit(err ? 1 : 0);
  });
});
