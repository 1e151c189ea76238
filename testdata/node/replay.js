// Makes the enrollments of an export, one a line, at a service by Azure's own service SDK, and prints how many they were.
// usage: node replay.js CONNECTION-STRING-FILE PORT EXPORT
'use strict';
const fs = require('fs');
const https = require('https');
const { ProvisioningServiceClient } = require('azure-iot-provisioning-service');

const [connectionFile, port, file] = process.argv.slice(2);
https.globalAgent.defaultPort = Number(port); // the SDK has no place for a port

async function main() {
  const client = ProvisioningServiceClient.fromConnectionString(fs.readFileSync(connectionFile, 'utf8').trim().replace(/:\d+;/, ';'));
  const lines = fs.readFileSync(file, 'utf8').trim().split('\n');
  for (const line of lines) {
    const enrollment = JSON.parse(line);
    await (enrollment.enrollmentGroupId ? client.createOrUpdateEnrollmentGroup(enrollment) : client.createOrUpdateIndividualEnrollment(enrollment));
  }
  console.log(lines.length);
}

main().then(() => process.exit(0), (err) => {
  console.error(`${err.name}: ${err.message} ${err.responseBody || ''}`);
  process.exit(1);
});
