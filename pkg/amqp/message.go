package amqp

// Properties are a message's standard properties (part 3, §3.2.4).
type Properties struct {
	MessageID          any // of type uint64, UUID, []byte or string, as are the other IDs
	UserID             []byte
	To                 any
	Subject            string
	ReplyTo            any
	CorrelationID      any
	ContentType        Symbol
	ContentEncoding    Symbol
	AbsoluteExpiryTime *Timestamp
	CreationTime       *Timestamp
	GroupID            string
	GroupSequence      *uint32
	ReplyToGroupID     string
}

func (*Properties) code() uint64 { return 0x73 }
func (p *Properties) fields(f *fields) {
	id(f, &p.MessageID)
	octets(f, &p.UserID)
	free(f, &p.To)
	opt(f, &p.Subject, "")
	free(f, &p.ReplyTo)
	id(f, &p.CorrelationID)
	opt(f, &p.ContentType, "")
	opt(f, &p.ContentEncoding, "")
	ptr(f, &p.AbsoluteExpiryTime)
	ptr(f, &p.CreationTime)
	opt(f, &p.GroupID, "")
	ptr(f, &p.GroupSequence)
	opt(f, &p.ReplyToGroupID, "")
}

// id is a message ID (part 3, §3.2.11 to 3.2.14).
func id(f *fields, p *any) {
	free(f, p)
	switch (*p).(type) {
	case nil, uint64, UUID, []byte, string:
	default:
		if f.err == nil {
			f.err = malformed("message ID of type %T", *p)
		}
	}
}

// A Message is a message without what only brokers want of it.
type Message struct {
	Properties            *Properties
	ApplicationProperties Map
	// Data is what the data sections hold, in one; nil without one.
	Data []byte
	// Value is the message's amqp-value, if it has one instead.
	Value any
}

// DecodeMessage reads a whole message (part 3, §3.2). Header, annotations, footer and sequences are checked and skipped.
func DecodeMessage(b []byte) (*Message, error) {
	m := &Message{}
	d := decoder{b: b, left: maxValues}
	last := uint64(0x6f)
	for len(d.b) > 0 {
		v, err := d.value(maxDepth)
		if err != nil {
			return nil, err
		}
		var code uint64
		switch v := v.(type) {
		case *Properties:
			code, m.Properties = 0x73, v
		case *Described:
			code, _ = v.Descriptor.(uint64)
			if err := m.section(code, v.Value); err != nil {
				return nil, err
			}
		}
		// Sections come in the order of their codes, and only data and sequences more than once.
		if code < 0x70 || code > 0x78 || code < last || code == last && code != 0x75 && code != 0x76 ||
			last >= 0x75 && code != last && code != 0x78 {
			return nil, malformed("message section %T behind section %#x", v, last)
		}
		last = code
	}
	return m, nil
}

func (m *Message) section(code uint64, v any) error {
	ok := true
	switch code {
	case 0x74:
		if m.ApplicationProperties, ok = v.(Map); ok {
			for _, p := range m.ApplicationProperties {
				if _, text := p.Key.(string); !text {
					ok = false
				}
			}
		}
	case 0x75:
		var data []byte
		if data, ok = v.([]byte); m.Data == nil {
			m.Data = data
		} else {
			m.Data = append(m.Data, data...) // behind data's own end, whose capacity is its length
		}
	case 0x70, 0x76:
		_, ok = v.([]any)
	case 0x71, 0x72, 0x78:
		_, ok = v.(Map)
	case 0x77:
		m.Value = v
	}
	if !ok {
		return malformed("message section %#x of type %T", code, v)
	}
	return nil
}

// AppendMessage appends a message. Data that are not nil make one data section; a value that is not nil stands instead of
// them.
func AppendMessage(b []byte, m *Message) []byte {
	if m.Properties != nil {
		b = Append(b, m.Properties)
	}
	if m.ApplicationProperties != nil {
		b = Append(b, &Described{uint64(0x74), m.ApplicationProperties})
	}
	if m.Value != nil {
		return Append(b, &Described{uint64(0x77), m.Value})
	}
	if m.Data != nil {
		b = Append(b, &Described{uint64(0x75), m.Data})
	}
	return b
}
