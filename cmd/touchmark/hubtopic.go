package main

import "github.com/spf13/cobra"

var builtinHubTopic = &cobra.Command{
	Use:   "builtin-hub",
	Short: "A device developer's page: a small hub in the same process",
	Long: `touchmark serve --hub builtin is a hub beside the registration service, so that a device goes the whole way on one machine: it is
switched on, registers, is told its hub, connects there, and sends. Azure's device SDKs and its service SDKs use it unchanged.

START
    touchmark serve --data service --hub builtin
    touchmark serve --ephemeral --seed ci --hub builtin --json
  The hub is called what the service's host is called: the first --hostname, or localhost. That is what devices are told, and where
  they go: MQTT on 8883, MQTT in WebSockets on 443. The doors tell by the user name whether a device wants to register or has come to
  its hub.

MANAGE IT
  Its connection string (policy iothubowner) is in hub.connection in the data directory, or where --hub-connection-out says; without
  either it is on the ready line as hubConnectionString:
    const { Registry, Client } = require('azure-iothub')
    Registry.fromConnectionString(text)            devices, twins, queries, bulk
    Client.fromConnectionString(text)              invokeDeviceMethod, and send over AMQP on 5671, in WebSockets with AmqpWs on 443
  The policies are Azure's: iothubowner, service, device, registryRead, registryReadWrite. NODE_EXTRA_CA_CERTS is ca.pem.
  Queries are SELECT * FROM devices, with WHERE path = value AND …: other text is refused.

MESSAGES
  --hub-messages FILE, or -, writes what devices send as lines of JSON. Two calls are ours, with a token of a policy with ServiceConnect:
    GET  /devices/ID/messages/events?api-version=2021-04-12         the last 100 messages of a device
    POST /devices/ID/messages/devicebound?api-version=2021-04-12    the body goes to the device; iothub-app-NAME headers are properties
  Messages to a device wait for it for an hour, at most 50, in memory.

WHAT IT IS NOT
  It is for development and tests. It takes 10,000 devices, runs in one process, and forgets messages when it stops; devices and
  twins stay with --data, and touchmark backup takes them along. (Where the store is in PostgreSQL they are in hub.db in the data directory
  all the same: copy that while the service is stopped.) There are no modules, jobs, configurations, routes, file uploads and feedback,
  and devices speak MQTT, not AMQP.
  Updates of desired properties that a device missed it reads from its twin.`,
}
