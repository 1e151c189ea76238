package amqp

// A composite is a struct that stands behind a descriptor, as a list of its fields.
type composite interface {
	code() uint64
	// fields visits the fields in the order of the wire, to read them or to write them.
	fields(*fields)
}

// A Performative is what a frame holds: one of the structs of this package that have a frame of their own.
type Performative interface {
	composite
	sasl() bool
}

// fields reads a composite's fields from a list, or writes them into one.
type fields struct {
	writing bool
	items   []any // to be read; or written
	err     error
}

func (f *fields) next() any {
	if len(f.items) == 0 {
		return nil // fields at the end may be left out
	}
	v := f.items[0]
	f.items = f.items[1:]
	return v
}

// must is a field that has to be there.
func must[T any](f *fields, p *T) {
	if f.writing {
		f.items = append(f.items, *p)
		return
	}
	v, ok := f.next().(T)
	if !ok && f.err == nil {
		f.err = malformed("mandatory field of type %T", *p)
	}
	*p = v
}

// opt is a field that stands for a default when it is not there.
func opt[T comparable](f *fields, p *T, absent T) {
	if f.writing {
		if *p == absent {
			f.items = append(f.items, nil)
		} else {
			f.items = append(f.items, *p)
		}
		return
	}
	*p = absent
	if v := f.next(); v != nil {
		read(f, p, v)
	}
}

// ptr is a field that may be missing, which is not the same as any value of it.
func ptr[T any](f *fields, p **T) {
	if f.writing {
		if *p == nil {
			f.items = append(f.items, nil)
		} else {
			f.items = append(f.items, **p)
		}
		return
	}
	if v := f.next(); v != nil {
		*p = new(T)
		read(f, *p, v)
	}
}

// sub is a field that is a composite.
func sub[T any](f *fields, p **T) {
	if f.writing {
		if *p == nil {
			f.items = append(f.items, nil)
		} else {
			f.items = append(f.items, *p)
		}
		return
	}
	if v := f.next(); v != nil {
		read(f, p, v)
	}
}

// free is a field of any type.
func free(f *fields, p *any) {
	if f.writing {
		f.items = append(f.items, *p)
		return
	}
	*p = f.next()
}

// octets and table are fields whose absence is nil.
func octets(f *fields, p *[]byte) {
	if f.writing && *p == nil {
		f.items = append(f.items, nil)
	} else if f.writing {
		f.items = append(f.items, *p)
	} else if v := f.next(); v != nil {
		read(f, p, v)
	}
}

func table(f *fields, p *Map) {
	if f.writing && *p == nil {
		f.items = append(f.items, nil)
	} else if f.writing {
		f.items = append(f.items, *p)
	} else if v := f.next(); v != nil {
		read(f, p, v)
	}
}

func read[T any](f *fields, p *T, v any) {
	x, ok := v.(T)
	if !ok && f.err == nil {
		f.err = malformed("field of type %T, want %T", v, *p)
	}
	*p = x
}

func listOf(c composite) []any {
	f := &fields{writing: true}
	c.fields(f)
	for len(f.items) > 0 && f.items[len(f.items)-1] == nil {
		f.items = f.items[:len(f.items)-1]
	}
	return f.items
}

// composites are the structs by their descriptors, which are numbers or names (part 2, §2.7; part 3; part 5, §5.3.3).
func newComposite(code uint64) composite {
	switch code {
	case 0x10:
		return &Open{}
	case 0x11:
		return &Begin{}
	case 0x12:
		return &Attach{}
	case 0x13:
		return &Flow{}
	case 0x14:
		return &Transfer{}
	case 0x15:
		return &Disposition{}
	case 0x16:
		return &Detach{}
	case 0x17:
		return &End{}
	case 0x18:
		return &Close{}
	case 0x1d:
		return &Error{}
	case 0x23:
		return &Received{}
	case 0x24:
		return &Accepted{}
	case 0x25:
		return &Rejected{}
	case 0x26:
		return &Released{}
	case 0x27:
		return &Modified{}
	case 0x28:
		return &Source{}
	case 0x29:
		return &Target{}
	case 0x40:
		return &SASLMechanisms{}
	case 0x41:
		return &SASLInit{}
	case 0x42:
		return &SASLChallenge{}
	case 0x43:
		return &SASLResponse{}
	case 0x44:
		return &SASLOutcome{}
	case 0x73:
		return &Properties{}
	}
	return nil
}

func codeOf(name Symbol) uint64 {
	switch name {
	case "amqp:open:list":
		return 0x10
	case "amqp:begin:list":
		return 0x11
	case "amqp:attach:list":
		return 0x12
	case "amqp:flow:list":
		return 0x13
	case "amqp:transfer:list":
		return 0x14
	case "amqp:disposition:list":
		return 0x15
	case "amqp:detach:list":
		return 0x16
	case "amqp:end:list":
		return 0x17
	case "amqp:close:list":
		return 0x18
	case "amqp:error:list":
		return 0x1d
	case "amqp:received:list":
		return 0x23
	case "amqp:accepted:list":
		return 0x24
	case "amqp:rejected:list":
		return 0x25
	case "amqp:released:list":
		return 0x26
	case "amqp:modified:list":
		return 0x27
	case "amqp:source:list":
		return 0x28
	case "amqp:target:list":
		return 0x29
	case "amqp:sasl-mechanisms:list":
		return 0x40
	case "amqp:sasl-init:list":
		return 0x41
	case "amqp:sasl-challenge:list":
		return 0x42
	case "amqp:sasl-response:list":
		return 0x43
	case "amqp:sasl-outcome:list":
		return 0x44
	case "amqp:header:list":
		return 0x70
	case "amqp:delivery-annotations:map":
		return 0x71
	case "amqp:message-annotations:map":
		return 0x72
	case "amqp:properties:list":
		return 0x73
	case "amqp:application-properties:map":
		return 0x74
	case "amqp:data:binary":
		return 0x75
	case "amqp:amqp-sequence:list":
		return 0x76
	case "amqp:amqp-value:*":
		return 0x77
	case "amqp:footer:map":
		return 0x78
	}
	return 0
}

// describe makes of a described value the struct that its descriptor names.
func describe(descriptor, v any) (any, error) {
	var code uint64
	switch d := descriptor.(type) {
	case uint64:
		code = d
	case Symbol:
		if code = codeOf(d); code != 0 {
			descriptor = code
		}
	}
	c := newComposite(code)
	if c == nil {
		return &Described{descriptor, v}, nil
	}
	items, ok := v.([]any)
	if !ok {
		return nil, malformed("%T that is no list", c)
	}
	f := &fields{items: items}
	c.fields(f)
	if f.err == nil && len(f.items) > 0 {
		f.err = malformed("%T has %d fields too many", c, len(f.items))
	}
	if f.err != nil {
		return nil, f.err
	}
	return c, nil
}

// Open is the connection's first frame (part 2, §2.7.1).
type Open struct {
	ContainerID         string
	Hostname            string
	MaxFrameSize        uint32 // octets; 4294967295 is AMQP's default
	ChannelMax          uint16 // 65535 is AMQP's default
	IdleTimeout         uint32 // milliseconds; 0 for none
	OutgoingLocales     any
	IncomingLocales     any
	OfferedCapabilities any
	DesiredCapabilities any
	Properties          Map
}

func (*Open) code() uint64 { return 0x10 }
func (*Open) sasl() bool   { return false }
func (o *Open) fields(f *fields) {
	must(f, &o.ContainerID)
	opt(f, &o.Hostname, "")
	opt(f, &o.MaxFrameSize, 1<<32-1)
	opt(f, &o.ChannelMax, 1<<16-1)
	opt(f, &o.IdleTimeout, 0)
	free(f, &o.OutgoingLocales)
	free(f, &o.IncomingLocales)
	free(f, &o.OfferedCapabilities)
	free(f, &o.DesiredCapabilities)
	table(f, &o.Properties)
}

// Begin opens a session (part 2, §2.7.2).
type Begin struct {
	RemoteChannel       *uint16 // in an answer: the peer's channel
	NextOutgoingID      uint32
	IncomingWindow      uint32
	OutgoingWindow      uint32
	HandleMax           uint32 // 4294967295 is AMQP's default
	OfferedCapabilities any
	DesiredCapabilities any
	Properties          Map
}

func (*Begin) code() uint64 { return 0x11 }
func (*Begin) sasl() bool   { return false }
func (b *Begin) fields(f *fields) {
	ptr(f, &b.RemoteChannel)
	must(f, &b.NextOutgoingID)
	must(f, &b.IncomingWindow)
	must(f, &b.OutgoingWindow)
	opt(f, &b.HandleMax, 1<<32-1)
	free(f, &b.OfferedCapabilities)
	free(f, &b.DesiredCapabilities)
	table(f, &b.Properties)
}

// Roles of a link's end: true is the receiver's.
const (
	Sender   = false
	Receiver = true
)

// Settle modes (part 2, §2.8.2 and 2.8.3).
const (
	SendUnsettled uint8 = 0
	SendSettled   uint8 = 1
	SendMixed     uint8 = 2
	ReceiveFirst  uint8 = 0
	ReceiveSecond uint8 = 1
)

// Attach opens a link (part 2, §2.7.3). A missing source or target refuses it.
type Attach struct {
	Name                 string
	Handle               uint32
	Role                 bool
	SndSettleMode        uint8
	RcvSettleMode        uint8
	Source               *Source
	Target               *Target
	Unsettled            Map
	IncompleteUnsettled  bool
	InitialDeliveryCount *uint32 // a sender's
	MaxMessageSize       uint64  // octets; 0 for no limit
	OfferedCapabilities  any
	DesiredCapabilities  any
	Properties           Map
}

func (*Attach) code() uint64 { return 0x12 }
func (*Attach) sasl() bool   { return false }
func (a *Attach) fields(f *fields) {
	must(f, &a.Name)
	must(f, &a.Handle)
	must(f, &a.Role)
	opt(f, &a.SndSettleMode, SendMixed)
	opt(f, &a.RcvSettleMode, ReceiveFirst)
	sub(f, &a.Source)
	sub(f, &a.Target)
	table(f, &a.Unsettled)
	opt(f, &a.IncompleteUnsettled, false)
	ptr(f, &a.InitialDeliveryCount)
	opt(f, &a.MaxMessageSize, 0)
	free(f, &a.OfferedCapabilities)
	free(f, &a.DesiredCapabilities)
	table(f, &a.Properties)
	if (a.SndSettleMode > SendMixed || a.RcvSettleMode > ReceiveSecond) && f.err == nil {
		f.err = malformed("settle modes %d and %d", a.SndSettleMode, a.RcvSettleMode)
	}
}

// Source is where a link's messages come from (part 3, §3.5.3).
type Source struct {
	Address               any
	Durable               uint32
	ExpiryPolicy          Symbol // empty for the default, session-end
	Timeout               uint32
	Dynamic               bool
	DynamicNodeProperties Map
	DistributionMode      Symbol
	Filter                Map
	DefaultOutcome        any
	Outcomes              any
	Capabilities          any
}

func (*Source) code() uint64 { return 0x28 }
func (s *Source) fields(f *fields) {
	free(f, &s.Address)
	opt(f, &s.Durable, 0)
	opt(f, &s.ExpiryPolicy, "")
	opt(f, &s.Timeout, 0)
	opt(f, &s.Dynamic, false)
	table(f, &s.DynamicNodeProperties)
	opt(f, &s.DistributionMode, "")
	table(f, &s.Filter)
	free(f, &s.DefaultOutcome)
	free(f, &s.Outcomes)
	free(f, &s.Capabilities)
}

// Target is where a link's messages go (part 3, §3.5.4).
type Target struct {
	Address               any
	Durable               uint32
	ExpiryPolicy          Symbol // empty for the default, session-end
	Timeout               uint32
	Dynamic               bool
	DynamicNodeProperties Map
	Capabilities          any
}

func (*Target) code() uint64 { return 0x29 }
func (t *Target) fields(f *fields) {
	free(f, &t.Address)
	opt(f, &t.Durable, 0)
	opt(f, &t.ExpiryPolicy, "")
	opt(f, &t.Timeout, 0)
	opt(f, &t.Dynamic, false)
	table(f, &t.DynamicNodeProperties)
	free(f, &t.Capabilities)
}

// Flow tells windows and credit (part 2, §2.7.4).
type Flow struct {
	NextIncomingID *uint32
	IncomingWindow uint32
	NextOutgoingID uint32
	OutgoingWindow uint32
	Handle         *uint32
	DeliveryCount  *uint32
	LinkCredit     *uint32
	Available      *uint32
	Drain          bool
	Echo           bool
	Properties     Map
}

func (*Flow) code() uint64 { return 0x13 }
func (*Flow) sasl() bool   { return false }
func (w *Flow) fields(f *fields) {
	ptr(f, &w.NextIncomingID)
	must(f, &w.IncomingWindow)
	must(f, &w.NextOutgoingID)
	must(f, &w.OutgoingWindow)
	ptr(f, &w.Handle)
	ptr(f, &w.DeliveryCount)
	ptr(f, &w.LinkCredit)
	ptr(f, &w.Available)
	opt(f, &w.Drain, false)
	opt(f, &w.Echo, false)
	table(f, &w.Properties)
}

// Transfer carries a message, or a part of one (part 2, §2.7.5).
type Transfer struct {
	Handle        uint32
	DeliveryID    *uint32
	DeliveryTag   []byte // at most 32 octets
	MessageFormat *uint32
	Settled       *bool
	More          bool
	RcvSettleMode *uint8
	State         any
	Resume        bool
	Aborted       bool
	Batchable     bool
}

func (*Transfer) code() uint64 { return 0x14 }
func (*Transfer) sasl() bool   { return false }
func (t *Transfer) fields(f *fields) {
	must(f, &t.Handle)
	ptr(f, &t.DeliveryID)
	octets(f, &t.DeliveryTag)
	ptr(f, &t.MessageFormat)
	ptr(f, &t.Settled)
	opt(f, &t.More, false)
	ptr(f, &t.RcvSettleMode)
	free(f, &t.State)
	opt(f, &t.Resume, false)
	opt(f, &t.Aborted, false)
	opt(f, &t.Batchable, false)
	if len(t.DeliveryTag) > 32 && f.err == nil { // part 2, §2.8.7
		f.err = malformed("delivery tag of %d octets", len(t.DeliveryTag))
	}
}

// Disposition tells the state of deliveries (part 2, §2.7.6).
type Disposition struct {
	Role      bool // of who tells
	First     uint32
	Last      *uint32 // nil: the first alone
	Settled   bool
	State     any // such as *Accepted
	Batchable bool
}

func (*Disposition) code() uint64 { return 0x15 }
func (*Disposition) sasl() bool   { return false }
func (d *Disposition) fields(f *fields) {
	must(f, &d.Role)
	must(f, &d.First)
	ptr(f, &d.Last)
	opt(f, &d.Settled, false)
	free(f, &d.State)
	opt(f, &d.Batchable, false)
}

// Detach ends a link, or with Closed unset leaves it (part 2, §2.7.7).
type Detach struct {
	Handle uint32
	Closed bool
	Error  *Error
}

func (*Detach) code() uint64 { return 0x16 }
func (*Detach) sasl() bool   { return false }
func (d *Detach) fields(f *fields) {
	must(f, &d.Handle)
	opt(f, &d.Closed, false)
	sub(f, &d.Error)
}

// End ends a session (part 2, §2.7.8).
type End struct{ Error *Error }

func (*End) code() uint64       { return 0x17 }
func (*End) sasl() bool         { return false }
func (e *End) fields(f *fields) { sub(f, &e.Error) }

// Close ends a connection (part 2, §2.7.9).
type Close struct{ Error *Error }

func (*Close) code() uint64       { return 0x18 }
func (*Close) sasl() bool         { return false }
func (c *Close) fields(f *fields) { sub(f, &c.Error) }

// Error is why something ended or was refused (part 2, §2.8.14).
type Error struct {
	Condition   Symbol
	Description string
	Info        Map
}

func (*Error) code() uint64 { return 0x1d }
func (e *Error) fields(f *fields) {
	must(f, &e.Condition)
	opt(f, &e.Description, "")
	table(f, &e.Info)
}

// Received tells how far a delivery has come (part 3, §3.4.1).
type Received struct {
	SectionNumber uint32
	SectionOffset uint64
}

func (*Received) code() uint64 { return 0x23 }
func (r *Received) fields(f *fields) {
	must(f, &r.SectionNumber)
	must(f, &r.SectionOffset)
}

// Outcomes of a delivery (part 3, §3.4.2 to 3.4.5).
type (
	Accepted struct{}
	Rejected struct{ Error *Error }
	Released struct{}
	Modified struct {
		DeliveryFailed     bool
		UndeliverableHere  bool
		MessageAnnotations Map
	}
)

func (*Accepted) code() uint64       { return 0x24 }
func (*Accepted) fields(*fields)     {}
func (*Rejected) code() uint64       { return 0x25 }
func (r *Rejected) fields(f *fields) { sub(f, &r.Error) }
func (*Released) code() uint64       { return 0x26 }
func (*Released) fields(*fields)     {}
func (*Modified) code() uint64       { return 0x27 }
func (m *Modified) fields(f *fields) {
	opt(f, &m.DeliveryFailed, false)
	opt(f, &m.UndeliverableHere, false)
	table(f, &m.MessageAnnotations)
}

// SASLMechanisms announces what the server takes (part 5, §5.3.3.1).
type SASLMechanisms struct{ Mechanisms []Symbol }

func (*SASLMechanisms) code() uint64 { return 0x40 }
func (*SASLMechanisms) sasl() bool   { return true }
func (m *SASLMechanisms) fields(f *fields) {
	if f.writing {
		f.items = append(f.items, Symbols(m.Mechanisms...)) // an array even of one: some clients demand it
		return
	}
	switch v := f.next().(type) {
	case Symbol:
		m.Mechanisms = []Symbol{v}
	case *Array:
		for _, x := range v.Items {
			if s, ok := x.(Symbol); ok && v.Descriptor == nil {
				m.Mechanisms = append(m.Mechanisms, s)
			}
		}
	}
	if len(m.Mechanisms) == 0 {
		f.err = malformed("no SASL mechanism")
	}
}

// SASLInit chooses a mechanism and begins it (part 5, §5.3.3.2).
type SASLInit struct {
	Mechanism       Symbol
	InitialResponse []byte
	Hostname        string
}

func (*SASLInit) code() uint64 { return 0x41 }
func (*SASLInit) sasl() bool   { return true }
func (i *SASLInit) fields(f *fields) {
	must(f, &i.Mechanism)
	octets(f, &i.InitialResponse)
	opt(f, &i.Hostname, "")
}

// SASLChallenge and SASLResponse are the steps of a mechanism (part 5, §5.3.3.3 and 5.3.3.4).
type (
	SASLChallenge struct{ Challenge []byte }
	SASLResponse  struct{ Response []byte }
)

func (*SASLChallenge) code() uint64       { return 0x42 }
func (*SASLChallenge) sasl() bool         { return true }
func (c *SASLChallenge) fields(f *fields) { must(f, &c.Challenge) }
func (*SASLResponse) code() uint64        { return 0x43 }
func (*SASLResponse) sasl() bool          { return true }
func (r *SASLResponse) fields(f *fields)  { must(f, &r.Response) }

// Codes of a SASL outcome (part 5, §5.3.3.6).
const (
	SASLOK        uint8 = 0
	SASLAuth      uint8 = 1 // the credentials do not do
	SASLTemporary uint8 = 4
)

// SASLOutcome ends the security layer's dialogue (part 5, §5.3.3.5).
type SASLOutcome struct {
	Code           uint8
	AdditionalData []byte
}

func (*SASLOutcome) code() uint64 { return 0x44 }
func (*SASLOutcome) sasl() bool   { return true }
func (o *SASLOutcome) fields(f *fields) {
	must(f, &o.Code)
	octets(f, &o.AdditionalData)
}
