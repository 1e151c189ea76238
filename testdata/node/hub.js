// Has Azure's service SDK manage the built-in hub, and Azure's device SDK talk to it, both unmodified. What is not as it should be
// is an assertion that fails. Prints the names of the parts that were done, as one line of JSON.
// usage: HUB_CONNECTION=… node hub.js HTTPS-PORT MQTT-PORT AMQP-PORT DIRECTORY-WITH-CERTIFICATE
'use strict';
const assert = require('assert').strict;
const fs = require('fs');
const https = require('https');
const path = require('path');
const crypto = require('crypto');
const { Registry, Client: ServiceClient } = require('azure-iothub');
const { Message: C2DMessage, NoRetry, SharedAccessSignature } = require('azure-iot-common');
const { Client: DeviceClient, Message } = require('azure-iot-device');
const { MqttWs } = require('azure-iot-device-mqtt');

const [httpsPort, mqttPort, amqpPort, certificates] = process.argv.slice(2);
const host = 'localhost';
const service = process.env.HUB_CONNECTION.replace(/HostName=[^;]*/, 'HostName=' + host);
const { Mqtt, webSocketAgent } = require('./ports')(host, httpsPort, mqttPort);

const registry = Registry.fromConnectionString(service);
const methods = ServiceClient.fromConnectionString(service);
const messages = ServiceClient.fromConnectionString(service.replace(host, `${host}:${amqpPort}`)); // AMQP takes a port
const did = [];

async function refused(promise, name) {
  const err = await promise.then(() => assert.fail(name + ' was expected'), (e) => e);
  assert.equal(err.name, name, err.stack);
  return err;
}

// call is for calls that only this hub has.
function call(method, where, headers, body) {
  const key = Buffer.from(/SharedAccessKey=([^;]*)/.exec(service)[1], 'base64');
  const se = Math.floor(Date.now() / 1000) + 60;
  const sig = crypto.createHmac('sha256', key).update(host + '\n' + se).digest('base64');
  const Authorization = `SharedAccessSignature sr=${host}&sig=${encodeURIComponent(sig)}&se=${se}&skn=iothubowner`;
  return new Promise((resolve, reject) => {
    const r = https.request({ host, method, path: where + '?api-version=2021-04-12', headers: { ...headers, Authorization } }, (res) => {
      let text = '';
      res.on('data', (d) => { text += d; }).on('end', () => resolve({ status: res.statusCode, body: text && JSON.parse(text) }));
    });
    r.on('error', reject).end(body);
  });
}

function once(emitter, name) {
  return new Promise((resolve) => emitter.once(name, resolve));
}

async function manage() {
  const made = (await registry.create({ deviceId: 'made', status: 'enabled' })).responseBody;
  assert.equal(made.authentication.type, 'sas');
  assert.equal(Buffer.from(made.authentication.symmetricKey.primaryKey, 'base64').length, 32);
  await refused(registry.create({ deviceId: 'made' }), 'DeviceAlreadyExistsError');
  const read = (await registry.get('made')).responseBody;
  assert.equal(read.etag, made.etag);
  assert.equal(read.generationId, made.generationId);
  assert.equal(read.connectionState, 'Disconnected');
  const changed = (await registry.update({ ...JSON.parse(JSON.stringify(read)), status: 'disabled', statusReason: 'a test' })).responseBody;
  assert.equal(changed.status, 'disabled');
  assert.notEqual(changed.etag, made.etag);
  assert.equal(changed.authentication.symmetricKey.primaryKey, made.authentication.symmetricKey.primaryKey);
  await refused(registry.get('nobody'), 'DeviceNotFoundError');
  await refused(registry.update({ deviceId: 'nobody' }), 'DeviceNotFoundError');
  await refused(registry.create({ deviceId: 'x509', authentication: { type: 'selfSigned', x509Thumbprint: { primaryThumbprint: 'zz' } } }), 'ArgumentError');
  assert.equal((await registry.list()).responseBody.some((d) => d.deviceId === 'made'), true);
  await registry.delete('made');
  await refused(registry.get('made'), 'DeviceNotFoundError');
  await refused(Registry.fromConnectionString(service.replace(/SharedAccessKey=..../, 'SharedAccessKey=AAAA')).list(), 'UnauthorizedError');
  did.push('identities');

  const many = Array.from({ length: 100 }, (_, i) => ({ deviceId: 'bulk-' + i }));
  assert.equal((await registry.addDevices(many)).responseBody.isSuccessful, true);
  const again = await refused(registry.addDevices([{ deviceId: 'bulk-0' }, { deviceId: 'bulk-new' }]), 'ArgumentError');
  const rows = JSON.parse(again.responseBody);
  assert.deepEqual([rows.isSuccessful, rows.errors.map((e) => [e.deviceId, e.errorCode])], [false, [['bulk-0', 409001]]]);
  await refused(registry.addDevices([...many, { deviceId: 'one-more' }]), 'ArgumentError');
  assert.equal((await registry.updateDevices([{ deviceId: 'bulk-1', status: 'disabled' }], true)).responseBody.isSuccessful, true);
  const counts = (await registry.getRegistryStatistics()).responseBody;
  assert.deepEqual(counts, { totalDeviceCount: 101, enabledDeviceCount: 100, disabledDeviceCount: 1 });
  assert.equal((await registry.removeDevices([{ deviceId: 'bulk-new' }], true)).responseBody.isSuccessful, true);
  did.push('bulk');

  const parent = (await registry.create({ deviceId: 'edge', capabilities: { iotEdge: true } })).responseBody;
  assert.match(parent.deviceScope, /^ms-azure-iot-edge:\/\/edge-\d+$/);
  const child = (await registry.create({ deviceId: 'leaf', deviceScope: parent.deviceScope })).responseBody;
  assert.deepEqual(child.parentScopes, [parent.deviceScope]);
  await refused(registry.create({ deviceId: 'stray', deviceScope: 'ms-azure-iot-edge://leaf-' + child.generationId }), 'ArgumentError');
  did.push('parents');

  const twin = (await registry.getTwin('bulk-2')).responseBody;
  const first = (await registry.updateTwin('bulk-2', { tags: { site: 'A7', floor: { n: 2 } }, properties: { desired: { interval: 30 } } }, twin.etag)).responseBody;
  assert.equal(first.properties.desired.interval, 30);
  assert.equal(first.properties.desired.$version, 2);
  assert.ok(first.properties.desired.$metadata.interval.$lastUpdated);
  await refused(registry.updateTwin('bulk-2', { tags: { site: 'B' } }, twin.etag), 'InvalidEtagError');
  const second = (await registry.updateTwin('bulk-2', { tags: { site: null } }, '*')).responseBody;
  assert.deepEqual(second.tags, { floor: { n: 2 } });
  await refused(registry.updateTwin('bulk-2', { tags: { 'a.b': 1 } }, '*'), 'ArgumentError');
  const found = [];
  const query = registry.createQuery('SELECT * FROM devices WHERE tags.floor.n = 2', 10);
  while (query.hasMoreResults) found.push(...(await query.nextAsTwin()).result);
  assert.deepEqual(found.map((t) => t.deviceId), ['bulk-2']);
  const all = [];
  for (const q = registry.createQuery('SELECT * FROM devices', 7); q.hasMoreResults;) all.push(...(await q.nextAsTwin(q.continuationToken)).result);
  assert.equal(new Set(all.map((t) => t.deviceId)).size, 102);
  await refused(registry.createQuery('SELECT COUNT() FROM devices').nextAsTwin(), 'ArgumentError');
  did.push('twins');
}

function connect(id, key, Transport, x509) {
  const client = DeviceClient.fromConnectionString(
    `HostName=${host};DeviceId=${id};` + (x509 ? 'x509=true' : `SharedAccessKey=${key}`), Transport);
  client.setRetryPolicy(new NoRetry());
  return client;
}

async function talk(name, Transport, x509) {
  const id = 'talk-' + name;
  const authentication = { type: 'sas' };
  const pem = (part) => fs.readFileSync(path.join(certificates, part), 'utf8');
  if (x509) {
    const sha1 = new crypto.X509Certificate(pem('device.pem')).fingerprint.replaceAll(':', '');
    const sha256 = new crypto.X509Certificate(pem('device.pem')).fingerprint256.replaceAll(':', '');
    authentication.type = 'selfSigned';
    authentication.x509Thumbprint = { primaryThumbprint: x509 === 'sha1' ? sha1 : sha256 };
  }
  const device = (await registry.create({ deviceId: id, authentication })).responseBody;
  const key = device.authentication.symmetricKey.primaryKey;
  const client = connect(id, key, Transport, x509);
  const options = { mqtt: { webSocketAgent } };
  if (x509) Object.assign(options, { cert: pem('device.pem'), key: pem('device.key') });
  await client.setOptions(options);
  await client.open();
  assert.equal((await registry.get(id)).responseBody.connectionState, 'Connected');

  const m = new Message(JSON.stringify({ t: 21.5 }));
  m.messageId = 'm 1/&';
  m.contentType = 'application/json';
  m.contentEncoding = 'utf-8';
  m.properties.add('alarm', 'yes & no');
  await client.sendEvent(m);
  await client.sendEvent(new Message(Buffer.alloc(200 * 1024)));
  for (let i = 0; i < 45; i++) await client.sendEvent(new Message(Buffer.alloc(200 * 1024))); // more than a device may bring that registers
  const seen = (await call('GET', `/devices/${id}/messages/events`)).body;
  assert.deepEqual([seen.length, seen[0].body, seen[0].systemProperties.mid, seen[0].properties.alarm], [47, { t: 21.5 }, 'm 1/&', 'yes & no']);

  const twin = await client.getTwin();
  assert.equal(twin.properties.desired.$version, 1);
  const told = once(twin, 'properties.desired.pace');
  await client.getTwin(); // an answer behind the subscription's
  await registry.updateTwin(id, { properties: { desired: { pace: { slow: 5 } } } }, '*');
  assert.deepEqual((await told), { slow: 5 });
  await new Promise((resolve, reject) => twin.properties.reported.update({ firmware: '1.2', old: { x: 1 } }, (e) => (e ? reject(e) : resolve())));
  await new Promise((resolve, reject) => twin.properties.reported.update({ old: null }, (e) => (e ? reject(e) : resolve())));
  const reported = (await registry.getTwin(id)).responseBody.properties.reported;
  assert.deepEqual([reported.firmware, reported.old, reported.$version], ['1.2', undefined, 3]);
  // The SDK does not look at the status of an answer: only the twin tells that this was refused.
  await new Promise((resolve) => twin.properties.reported.update({ 'a b': 1 }, resolve));
  assert.equal((await registry.getTwin(id)).responseBody.properties.reported.$version, 3);

  assert.match((await refused(methods.invokeDeviceMethod(id, { methodName: 'early' }), 'Error')).responseBody, /404103/);
  client.onDeviceMethod('add', (request, response) => response.send(207, { sum: request.payload.a + request.payload.b }));
  const answer = (await methods.invokeDeviceMethod(id, { methodName: 'add', payload: { a: 2, b: 3 }, connectTimeoutInSeconds: 10, responseTimeoutInSeconds: 10 })).result;
  assert.deepEqual(answer, { status: 207, payload: { sum: 5 } });
  await refused(methods.invokeDeviceMethod('nobody', { methodName: 'add' }), 'DeviceNotFoundError');

  // One listener for both: the SDK unsubscribes when the last one goes.
  let received;
  let arrived = new Promise((resolve) => { received = resolve; });
  client.on('message', (message) => received(message));
  const sent = await call('POST', `/devices/${id}/messages/devicebound`, { 'iothub-messageid': 'c2d 1', 'iothub-app-colour': 'blue & red' }, 'hello');
  assert.equal(sent.status, 204);
  const got = await arrived;
  assert.deepEqual([got.data.toString(), got.messageId, got.properties.getValue('colour')], ['hello', 'c2d 1', 'blue & red']);
  await client.complete(got);
  const out = new C2DMessage('x'.repeat(60 * 1024)); // more than fits one frame of some
  out.messageId = 'c2d 2';
  out.properties.add('colour', 'green');
  arrived = new Promise((resolve) => { received = resolve; });
  await messages.send(id, out);
  const second = await arrived;
  assert.deepEqual([second.data.length, second.messageId, second.properties.getValue('colour')], [60 * 1024, 'c2d 2', 'green']);
  await client.complete(second);

  if (!x509) {
    // The same device from somewhere else: the first is hung up on, and can come back.
    const other = connect(id, device.authentication.symmetricKey.secondaryKey, Transport);
    await other.setOptions(options);
    const lost = once(client, 'disconnect');
    await other.open();
    await lost;
    await other.sendEvent(new Message('from elsewhere'));
    await other.close();
    const back = connect(id, key, Transport);
    await back.setOptions(options);
    await back.open();
    await back.close();

    // A token that expires ends the connection.
    const se = Math.floor(Date.now() / 1000) + 3;
    const short = DeviceClient.fromSharedAccessSignature(SharedAccessSignature.create(encodeURIComponent(`${host}/devices/${id}`), null, key, se).toString(), Transport);
    short.setRetryPolicy(new NoRetry());
    await short.setOptions(options);
    const ended = once(short, 'disconnect');
    await short.open();
    await ended;
    assert.ok(Date.now() / 1000 >= se - 1);

    const wrong = connect(id, Buffer.alloc(32).toString('base64'), Transport);
    await wrong.setOptions(options);
    await assert.rejects(wrong.open(), /[Nn]ot authorized/);
  } else {
    await client.close();
  }
  assert.equal((await registry.get(id)).responseBody.connectionState, 'Disconnected');
  did.push(name);
}

(async () => {
  await manage();
  await messages.open();
  await refused(messages.send('nobody', new C2DMessage('x')), 'DeviceNotFoundError');
  const stranger = ServiceClient.fromConnectionString(service.replace(host, `${host}:${amqpPort}`).replace(/SharedAccessKey=..../, 'SharedAccessKey=AAAA'));
  assert.equal((await refused(stranger.open(), 'Error')).amqpError.name, 'UnauthorizedError');
  did.push('amqp');
  await talk('mqtt', Mqtt);
  await talk('mqtt-ws', MqttWs);
  await talk('mqtt-sha1', Mqtt, 'sha1');
  await talk('mqtt-ws-sha256', MqttWs, 'sha256');
  await messages.close();
  console.log(JSON.stringify(did));
  process.exit(0);
})().catch((err) => {
  console.error(did, err);
  process.exit(1);
});
