package devhub

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"
)

// The topics (service API, section 5.6).
const (
	reportedTopic  = "$iothub/twin/PATCH/properties/reported/"
	getTwinTopic   = "$iothub/twin/GET/"
	answerTopic    = "$iothub/methods/res/"
	twinFilter     = "$iothub/twin/res/#"
	desiredFilter  = "$iothub/twin/PATCH/properties/desired/#"
	methodFilter   = "$iothub/methods/POST/#"
	maxTopic       = 4 << 10
	maxBag         = 100 // properties of a message
	willProperty   = "iothub-MessageType"
	retainProperty = "mqtt-retain"
)

func deviceboundFilter(id string) string { return "devices/" + id + "/messages/devicebound/#" }

func desiredTopic(version int64) string {
	return fmt.Sprintf("$iothub/twin/PATCH/properties/desired/?$version=%d", version)
}

func twinResponse(status int, rid, more string) string {
	return fmt.Sprintf("$iothub/twin/res/%d/?$rid=%s%s", status, rid, more)
}

// parseUsername reads {hubHost}/{clientId}/?api-version=…, of which only the first two count; a model ID is taken along.
func parseUsername(s string) (host, id, model string, ok bool) {
	if len(s) > 1024 {
		return "", "", "", false
	}
	host, rest, ok := strings.Cut(s, "/")
	if !ok {
		return "", "", "", false
	}
	id, rest, _ = strings.Cut(rest, "/")
	for pair := range strings.SplitSeq(strings.TrimPrefix(rest, "?"), "&") {
		if name, value, _ := strings.Cut(pair, "="); name == "model-id" {
			if text, err := url.PathUnescape(value); err == nil && len(text) <= 256 {
				model = text
			}
		}
	}
	return host, id, model, true
}

// parseBag reads the property bag behind a topic: percent-encoded name=value pairs between ampersands. Names that begin with
// "$." are the system's, and lose that.
func parseBag(s string) (system, properties map[string]string, err error) {
	system, properties = map[string]string{}, map[string]string{}
	if s = strings.TrimPrefix(s, "?"); s == "" {
		return system, properties, nil
	}
	if strings.Count(s, "&") >= maxBag {
		return nil, nil, fmt.Errorf("more than %d properties", maxBag)
	}
	for pair := range strings.SplitSeq(strings.TrimSuffix(s, "&"), "&") {
		name, value, _ := strings.Cut(pair, "=")
		name, err1 := url.PathUnescape(name)
		value, err2 := url.PathUnescape(value)
		if err1 != nil || err2 != nil || name == "" || strings.ContainsAny(name+value, "\x00") {
			return nil, nil, fmt.Errorf("property %.40q is not properly encoded", pair)
		}
		to := properties
		if short, is := strings.CutPrefix(name, "$."); is {
			to, name = system, short
		}
		if _, twice := to[name]; twice {
			return nil, nil, fmt.Errorf("property %.40q stands twice", name)
		}
		to[name] = value
	}
	return system, properties, nil
}

// bag writes what parseBag reads, in the order of the names, the system's first.
func bag(system, properties map[string]string) string {
	var pairs []string
	for _, part := range []struct {
		prefix string
		m      map[string]string
	}{{"$.", system}, {"", properties}} {
		for _, name := range sorted(part.m) {
			pairs = append(pairs, url.QueryEscape(part.prefix+name)+"="+url.QueryEscape(part.m[name]))
		}
	}
	// QueryEscape writes a space as a plus, which is no form's here.
	return strings.ReplaceAll(strings.Join(pairs, "&"), "+", "%20")
}

// parseRequest reads ?$rid=… behind a topic of twins and methods.
func parseRequest(s string) (rid string, ok bool) {
	s, ok = strings.CutPrefix(s, "?")
	if !ok {
		return "", false
	}
	for pair := range strings.SplitSeq(s, "&") {
		if name, value, _ := strings.Cut(pair, "="); name == "$rid" && value != "" && len(value) <= 256 {
			return value, true
		}
	}
	return "", false
}

// parseAnswer reads {status}/?$rid=… behind a method's answer.
func parseAnswer(s string) (status int, rid string, ok bool) {
	text, rest, ok := strings.Cut(s, "/")
	if !ok || len(text) > 10 {
		return 0, "", false
	}
	status, err := strconv.Atoi(text)
	if err != nil {
		return 0, "", false
	}
	rid, ok = parseRequest(rest)
	return status, rid, ok
}
