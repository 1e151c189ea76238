// Lets Azure's SDKs, which take no port, find a service on other ports than 443 and 8883: by Node's agents for HTTPS and
// WebSockets, and for MQTT by a gateway's name, which may have a port. The SDKs stay as they are.
'use strict';
const https = require('https');
const { Mqtt } = require('azure-iot-device-mqtt');

module.exports = function ports(host, httpsPort, mqttPort) {
  const createConnection = https.Agent.prototype.createConnection;
  https.Agent.prototype.createConnection = function elsewhere(options, done) {
    return createConnection.call(this, { ...options, port: Number(httpsPort) }, done);
  };
  return {
    webSocketAgent: new https.Agent(),
    Mqtt: function viaGateway(provider) {
      const credentials = provider.getDeviceCredentials.bind(provider);
      provider.getDeviceCredentials = (done) => credentials((err, c) => done(err, c && { ...c, gatewayHostName: `${host}:${mqttPort}` }));
      return new Mqtt(provider);
    },
  };
};
