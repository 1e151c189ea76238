// Drives the service API with Azure's own service SDK and prints what came of it as one line of JSON.
// usage: node service.js CONNECTION-STRING-FILE PORT [REGISTERED-DEVICE GROUP]
'use strict';
const fs = require('fs');
const https = require('https');
const { ProvisioningServiceClient } = require('azure-iot-provisioning-service');

const [connectionFile, port, device, itsGroup] = process.argv.slice(2);
https.globalAgent.defaultPort = Number(port); // the SDK has no place for a port

const client = ProvisioningServiceClient.fromConnectionString(fs.readFileSync(connectionFile, 'utf8').trim().replace(/:\d+;/, ';'));
const fails = async (f) => {
  try {
    await f();
    return 'nothing failed';
  } catch (err) {
    return err.name;
  }
};
const pages = async (query) => {
  const sizes = [];
  const ids = new Set();
  do {
    const page = (await query.next(query.continuationToken || undefined)).responseBody;
    sizes.push(page.length);
    page.forEach((row) => ids.add(row.registrationId || row.enrollmentGroupId));
  } while (query.hasMoreResults);
  return { sizes, ids: ids.size };
};
// The SDK's own promise of a bulk operation never comes true; its callback does.
const bulk = (operation) => new Promise((resolve, reject) => client.runBulkEnrollmentOperation(operation, (err, result) => (err ? reject(err) : resolve(result))));
const key = { type: 'symmetricKey', symmetricKey: {} };

async function main() {
  const out = {};
  // Individual enrollments.
  const made = (await client.createOrUpdateIndividualEnrollment({
    registrationId: 'node-1', deviceId: 'node-device', attestation: key, provisioningStatus: 'enabled',
    initialTwin: { tags: { site: 'A7', version: 1 }, properties: { desired: { interval: 30 } } },
    reprovisionPolicy: { updateHubAssignment: true, migrateDeviceData: true },
  })).responseBody;
  out.keys = Buffer.from(made.attestation.symmetricKey.primaryKey, 'base64').length;
  out.exists = await fails(() => client.createOrUpdateIndividualEnrollment({ registrationId: 'node-1', attestation: key }));
  const got = (await client.getIndividualEnrollment('node-1')).responseBody;
  out.twin = got.initialTwin;
  out.state = got.registrationState.status;
  out.hidden = got.attestation.symmetricKey === undefined;
  const mechanism = (await client.getIndividualEnrollmentAttestationMechanism('node-1')).responseBody;
  out.sameKeys = mechanism.symmetricKey.primaryKey === made.attestation.symmetricKey.primaryKey;
  got.provisioningStatus = 'disabled';
  const changed = (await client.createOrUpdateIndividualEnrollment(got)).responseBody;
  out.changed = changed.provisioningStatus === 'disabled' && changed.etag !== made.etag && changed.createdDateTimeUtc === made.createdDateTimeUtc;
  out.keptKeys = changed.attestation.symmetricKey.primaryKey === made.attestation.symmetricKey.primaryKey;
  out.stale = await fails(() => client.createOrUpdateIndividualEnrollment(got));
  out.staleDelete = await fails(() => client.deleteIndividualEnrollment('node-1', made.etag));
  await client.deleteIndividualEnrollment(changed);
  out.gone = await fails(() => client.getIndividualEnrollment('node-1'));
  out.invalid = await fails(() => client.createOrUpdateIndividualEnrollment({ registrationId: 'node-1', attestation: key, iotHubs: ['hub-a.example.net'] }));

  // Groups.
  const group = (await client.createOrUpdateEnrollmentGroup({ enrollmentGroupId: 'node-group', attestation: key })).responseBody;
  out.groupExists = await fails(() => client.createOrUpdateEnrollmentGroup({ enrollmentGroupId: 'node-group', attestation: key }));
  out.groupKeys = (await client.getEnrollmentGroupAttestationMechanism('node-group')).responseBody.symmetricKey.secondaryKey === group.attestation.symmetricKey.secondaryKey;
  out.group = (await client.getEnrollmentGroup('node-group')).responseBody.enrollmentGroupId;
  out.groups = (await pages(client.createEnrollmentGroupQuery({ query: '*' }, 1))).ids;
  await client.deleteEnrollmentGroup('node-group', '*');

  // Bulk, and pages of what it made.
  for (let i = 0; i < 15; i++) {
    const enrollments = Array.from({ length: 10 }, (_, n) => ({ registrationId: `bulk-${String(10 * i + n).padStart(3, '0')}`, attestation: key }));
    const res = await bulk({ mode: 'create', enrollments });
    if (!res.isSuccessful) throw new Error(JSON.stringify(res));
  }
  const again = await bulk({ mode: 'create', enrollments: [{ registrationId: 'bulk-000', attestation: key }, { registrationId: 'bulk-new', attestation: key }] });
  out.bulk = { ok: again.isSuccessful, errors: again.errors.map((e) => [e.registrationId, e.errorCode]) };
  await client.deleteIndividualEnrollment('bulk-new', '*');
  const first = (await client.getIndividualEnrollment('bulk-000')).responseBody;
  const updated = await bulk({ mode: 'updateIfMatchEtag', enrollments: [{ ...first, provisioningStatus: 'disabled' }] });
  out.bulkUpdate = updated.isSuccessful && (await client.getIndividualEnrollment('bulk-000')).responseBody.provisioningStatus;
  const all = await pages(client.createIndividualEnrollmentQuery({ query: 'select * from enrollments' }, 50));
  out.pages = { ...all, full: all.sizes.slice(0, 3) };
  out.bulkDelete = await bulk({ mode: 'delete', enrollments: [(await client.getIndividualEnrollment('bulk-000')).responseBody] });

  // Registrations.
  if (device) {
    const state = (await client.getDeviceRegistrationState(device)).responseBody;
    out.registration = { status: state.status, assignedHub: state.assignedHub };
    out.ofGroup = (await pages(client.createEnrollmentGroupDeviceRegistrationStateQuery({ query: '*' }, itsGroup, 50))).ids;
    await client.deleteDeviceRegistrationState(state);
    out.forgotten = await fails(() => client.getDeviceRegistrationState(device));
  }
  console.log(JSON.stringify(out));
}

main().then(() => process.exit(0), (err) => {
  console.log(JSON.stringify({ error: `${err.name}: ${err.message} ${err.responseBody || ''}` }));
  process.exit(1);
});
