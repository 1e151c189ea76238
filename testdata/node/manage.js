// Manages provisioning services with Azure's own management client and prints what came of it as one line of JSON.
// usage: node manage.js ENDPOINT SUBSCRIPTION RESOURCE-GROUP NAME CA.pem; the token is read from standard input, and so are, when
// the code is there, PEM certificates that a CA signed: one line of JSON, {"certificate": "base64"}, for each that is printed.
'use strict';
const fs = require('fs');
const readline = require('readline');
const { IotDpsClient } = require('@azure/arm-deviceprovisioningservices');

const [endpoint, subscription, group, name, caFile] = process.argv.slice(2);
const lines = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const line = async () => (await lines.next()).value;

async function main() {
  const token = await line();
  const credential = { getToken: async () => ({ token, expiresOnTimestamp: Date.now() + 3600e3 }) };
  const client = new IotDpsClient(credential, subscription, { endpoint, $host: endpoint, credentialScopes: 'touchmark/.default' });
  const services = client.iotDpsResource;
  const certificates = client.dpsCertificate;
  const all = async (pages) => { const out = []; for await (const x of pages) out.push(x); return out; };
  const fails = async (f) => { try { await f; return 'nothing'; } catch (e) { return `${e.statusCode} ${e.code}`; } };
  const fast = { updateIntervalInMs: 100 };
  const out = {};

  out.free = (await services.checkProvisioningServiceNameAvailability({ name })).nameAvailable;
  const made = await services.beginCreateOrUpdateAndWait(group, name, {
    location: 'westeurope', sku: { name: 'S1' }, tags: { made: 'by node' },
    properties: { iotHubs: [{ connectionString: 'HostName=hub-z.example.net;SharedAccessKeyName=dps;SharedAccessKey=MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=', location: 'westeurope' }] },
  }, fast);
  out.made = { idScope: made.properties.idScope, state: made.properties.state, hub: made.properties.iotHubs[0].connectionString };
  out.taken = (await services.checkProvisioningServiceNameAvailability({ name })).reason;
  const got = await services.get(name, group);
  got.properties.allocationPolicy = 'GeoLatency';
  const put = await services.beginCreateOrUpdateAndWait(group, name, got, fast);
  out.put = { allocationPolicy: put.properties.allocationPolicy, hub: put.properties.iotHubs[0].connectionString };
  out.tags = (await services.beginUpdateAndWait(group, name, { tags: { a: 'b' } }, fast)).tags;
  out.listed = (await all(services.listByResourceGroup(group))).map((s) => s.name);
  out.everywhere = (await all(services.listBySubscription())).map((s) => s.name);
  out.keys = (await all(services.listKeys(name, group))).map((k) => k.keyName);
  out.owner = (await services.listKeysForKeyName(name, 'provisioningserviceowner', group)).rights;
  out.skus = (await all(services.listValidSkus(name, group))).map((s) => s.name);
  out.operations = (await all(client.operations.list())).length;
  out.links = (await services.listPrivateLinkResources(group, name)).value.map((l) => l.name);
  const endpointState = { properties: { privateLinkServiceConnectionState: { status: 'Pending', description: 'x' } } };
  await services.beginCreateOrUpdatePrivateEndpointConnectionAndWait(group, name, 'pe', endpointState, fast);
  out.endpoints = (await services.listPrivateEndpointConnections(group, name)).map((e) => e.name);
  await services.beginDeletePrivateEndpointConnectionAndWait(group, name, 'pe', fast);

  const ca = fs.readFileSync(caFile);
  const uploaded = await certificates.createOrUpdate(group, name, 'ca', { properties: { certificate: ca } });
  out.certificate = { subject: uploaded.properties.subject, isVerified: uploaded.properties.isVerified, created: uploaded.properties.created instanceof Date };
  const code = await certificates.generateVerificationCode('ca', uploaded.etag, group, name);
  console.log(JSON.stringify({ code: code.properties.verificationCode }));
  const proof = JSON.parse(await line());
  out.wrong = await fails(certificates.verifyCertificate('ca', uploaded.etag, group, name, proof));
  const verified = await certificates.verifyCertificate('ca', code.etag, group, name, proof);
  out.verified = verified.properties.isVerified;
  out.certificates = (await certificates.list(group, name)).value.map((c) => c.name);
  await certificates.delete(group, verified.etag, name, 'ca');
  out.gone = await fails(certificates.get('ca', group, name));

  await services.beginDeleteAndWait(name, group, fast);
  out.deleted = await fails(services.get(name, group));
  const stranger = new IotDpsClient({ getToken: async () => ({ token: 'wrong', expiresOnTimestamp: Date.now() + 3600e3 }) }, subscription, { endpoint, $host: endpoint, credentialScopes: 'touchmark/.default' });
  out.stranger = await fails(stranger.iotDpsResource.get(name, group));
  console.log(JSON.stringify(out));
}

main().then(() => process.exit(0), (err) => { console.error(err); process.exit(1); });
