package devhub

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/mqtt"
)

// A Message is what a device sent, or is to be sent.
type Message struct {
	DeviceID string
	// Time is when the hub had it.
	Time time.Time
	// System are IoT Hub's own properties, by the short names that they have on MQTT: mid (message ID), cid (correlation ID), uid
	// (user ID), ct (content type), ce (content encoding), on, exp, to.
	System map[string]string
	// Properties are the application's.
	Properties map[string]string
	Body       []byte
	// Expiry is when a message to a device is given up; zero means an hour after it came.
	Expiry time.Time
}

// MarshalJSON writes a message as the sink and the hub's own calls show it: a body that is JSON as it is, another one in base64.
func (m *Message) MarshalJSON() ([]byte, error) {
	o := object{"deviceId": m.DeviceID, "enqueuedTimeUtc": stamp(m.Time), "systemProperties": m.System, "properties": m.Properties}
	if json.Valid(m.Body) {
		o["body"] = json.RawMessage(m.Body)
	} else {
		o["bodyBase64"] = base64.StdEncoding.EncodeToString(m.Body)
	}
	return json.Marshal(o)
}

func (m *Message) size() int {
	n := len(m.Body) + 64
	for _, part := range []map[string]string{m.System, m.Properties} {
		for k, v := range part {
			n += len(k) + len(v) + 32
		}
	}
	return n
}

// take takes a device's message in: keeps it, and hands it to the sinks.
func (h *Hub) take(m *Message) {
	m.Time = h.now()
	h.mu.Lock()
	if d := h.devices[m.DeviceID]; d != nil {
		d.active = m.Time
		d.inbox = append(d.inbox, m)
		h.kept += m.size()
		for len(d.inbox) > maxInbox || h.kept > maxKept && len(d.inbox) > 0 {
			h.kept -= d.inbox[0].size()
			d.inbox[0] = nil
			d.inbox = d.inbox[1:]
		}
	}
	h.mu.Unlock()
	if h.cfg.Telemetry != nil {
		h.cfg.Telemetry(m)
	}
	if h.cfg.Lines == nil {
		return
	}
	line, err := dps.Marshal(m)
	if err == nil {
		h.lines.Lock()
		_, err = h.cfg.Lines.Write(append(line, '\n'))
		h.lines.Unlock()
	}
	if err != nil {
		h.cfg.Log.Error("writing a device's message", "deviceId", m.DeviceID, "cause", err)
	}
}

// Messages returns what the hub still has of a device's messages, the last 100 at most, oldest first. ok says whether there is
// such a device.
func (h *Hub) Messages(id string) (all []*Message, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.devices[id]
	if d == nil {
		return nil, false
	}
	return append([]*Message{}, d.inbox...), true
}

// queued is a message to a device that it has not acknowledged.
type queued struct {
	m      *Message
	id     uint16   // packet identifier; 0 before it was sent
	in     *session // that it was sent in; nil while it waits
	trials int
}

const (
	maxTrials        = 10
	timeToLive       = time.Hour
	maxToDeviceTopic = 32 << 10 // of its properties, encoded
)

// Send queues a message to a device, connected or not. It waits in memory until the device acknowledges it, for an hour unless it
// says otherwise. Errors are refusals as a service would read them: no such device, too large, fifty waiting already.
func (h *Hub) Send(m *Message) error {
	if len(m.Body) > maxToDevice || len(bag(m.System, m.Properties)) > maxToDeviceTopic {
		return tooLarge(maxToDevice)
	}
	c := *m
	c.Time = h.now()
	if c.Expiry.IsZero() {
		c.Expiry = c.Time.Add(timeToLive)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.devices[m.DeviceID]
	if d == nil {
		return notFound(m.DeviceID)
	}
	h.expire(d)
	if len(d.queue) >= maxQueue || h.waiting() > maxKept {
		return queueFull()
	}
	d.queue = append(d.queue, &queued{m: &c})
	h.deliver(d)
	return nil
}

// waiting is how many octets wait for all devices. The caller holds mu.
func (h *Hub) waiting() (n int) {
	for _, d := range h.devices {
		for _, q := range d.queue {
			n += q.m.size()
		}
	}
	return n
}

// expire gives up messages that are too old or were sent too often.
func (h *Hub) expire(d *device) {
	now := h.now()
	kept := d.queue[:0]
	for _, q := range d.queue {
		if q.in != nil || now.Before(q.m.Expiry) && q.trials < maxTrials {
			kept = append(kept, q)
		}
	}
	clear(d.queue[len(kept):])
	d.queue = kept
}

// deliver sends what waits for a device that listens. The caller holds mu.
func (h *Hub) deliver(d *device) {
	h.expire(d)
	filter := deviceboundFilter(d.rec.ID)
	qos, ok := d.subs[filter]
	if !ok || d.session == nil {
		return
	}
	kept := d.queue[:0]
	for _, q := range d.queue {
		if q.in != nil {
			kept = append(kept, q)
			continue
		}
		again := q.id != 0
		if !again {
			q.id = d.packetID()
		}
		system := map[string]string{"to": "/devices/" + d.rec.ID + "/messages/deviceBound"}
		for k, v := range q.m.System {
			system[k] = v
		}
		b := mqtt.AppendPublish(nil, strings.TrimSuffix(filter, "#")+bag(system, q.m.Properties), qos, q.id, q.m.Body)
		if again && qos == 1 {
			b[0] |= 8 // DUP [MQTT-3.3.1-1]
		}
		d.session.tell(b)
		q.in = d.session
		if q.trials++; qos == 1 {
			kept = append(kept, q)
		}
	}
	clear(d.queue[len(kept):])
	d.queue = kept
}

// acknowledged takes a message off the queue.
func (s *session) acknowledged(id uint16) {
	s.h.mu.Lock()
	defer s.h.mu.Unlock()
	d := s.device()
	if d == nil || id == 0 {
		return
	}
	for i, q := range d.queue {
		if q.in == s && q.id == id {
			d.queue = append(d.queue[:i], d.queue[i+1:]...)
			return
		}
	}
}
