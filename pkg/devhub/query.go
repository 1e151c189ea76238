package devhub

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// A condition of a query: a path into a twin's document, compared with a literal.
type condition struct {
	path  []string
	not   bool
	value any
}

// What is honoured of IoT Hub's query language: every device, or those that meet all of some comparisons for equality. What it
// cannot do is refused, so that nobody takes an answer for another question's.
var (
	queryForm     = regexp.MustCompile(`(?is)^\s*SELECT\s+\*\s+FROM\s+devices(?:\s+WHERE\s+(.+?))?\s*;?\s*$`)
	conditionForm = regexp.MustCompile(`(?is)^\s*((?:devices\.)?[A-Za-z_][\w-]*(?:\.[\w-]+)*)\s*(=|!=|<>)\s*('(?:[^']|'')*'|-?\d+(?:\.\d+)?|true|false)\s*(AND\s|$)`)
)

const (
	maxQuery      = 4 << 10
	maxConditions = 16
)

func badQuery(why string) *failure {
	return &failure{name: "ArgumentInvalid", number: 400004, message: "BadRequest: this hub does not understand the query: " + why +
		". It knows SELECT * FROM devices, with WHERE path = value AND …"}
}

// parseQuery reads a query's text.
func parseQuery(text string) ([]condition, error) {
	if len(text) > maxQuery {
		return nil, badQuery("it is too long")
	}
	m := queryForm.FindStringSubmatch(text)
	if m == nil {
		return nil, badQuery("it is no SELECT * FROM devices")
	}
	var all []condition
	for rest := m[1]; rest != ""; {
		c := conditionForm.FindStringSubmatch(rest)
		if c == nil || len(all) == maxConditions {
			return nil, badQuery("a condition is no comparison for equality, or one too many")
		}
		x := condition{path: strings.Split(strings.TrimPrefix(c[1], "devices."), "."), not: c[2] != "="}
		switch x.path[0] {
		case "deviceId", "status", "connectionState", "authenticationType", "etag", "version", "modelId", "capabilities", "tags", "properties", "deviceScope":
		default:
			return nil, badQuery(fmt.Sprintf("there is no %.40q", c[1]))
		}
		switch literal := c[3]; {
		case literal[0] == '\'':
			x.value = strings.ReplaceAll(literal[1:len(literal)-1], "''", "'")
		case strings.EqualFold(literal, "true"), strings.EqualFold(literal, "false"):
			x.value = strings.EqualFold(literal, "true")
		default:
			f, err := strconv.ParseFloat(literal, 64)
			if err != nil {
				return nil, badQuery("a number is too large")
			}
			x.value = f
		}
		all = append(all, x)
		if rest = rest[len(c[0]):]; rest == "" && c[4] != "" {
			return nil, badQuery("it ends with AND")
		}
	}
	return all, nil
}

// meets judges a twin's document. What is not there equals nothing, and differs from nothing.
func (c condition) meets(o object) bool {
	var v any = o
	for _, name := range c.path {
		below, ok := v.(object)
		if !ok {
			return false
		}
		if v, ok = below[name]; !ok {
			return false
		}
	}
	switch x := v.(type) {
	case json.Number:
		f, err := x.Float64()
		if err != nil {
			return false
		}
		v = f
	case int64:
		v = float64(x)
	case object, []any, nil:
		return false
	}
	if fmt.Sprintf("%T", v) != fmt.Sprintf("%T", c.value) {
		return false
	}
	return (v == c.value) != c.not
}

// query returns the twins that meet a query, by their IDs, behind one, and where to go on: empty for the end.
func (h *Hub) query(text, after string, limit int) (page []object, next string, err error) {
	conditions, err := parseQuery(text)
	if err != nil {
		return nil, "", err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	page = []object{}
next:
	for _, id := range sorted(h.devices) {
		if id <= after {
			continue
		}
		doc := h.devices[id].twinDocument()
		for _, c := range conditions {
			if !c.meets(doc) {
				continue next
			}
		}
		if len(page) == limit {
			return page, page[limit-1]["deviceId"].(string), nil
		}
		page = append(page, doc)
	}
	return page, "", nil
}
