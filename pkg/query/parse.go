package query

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/touchmark/touchmark/pkg/dps"
)

// Bounds of a query.
const (
	maxText  = 4096
	maxDepth = 32
	maxList  = 100
)

// Parse reads a query. The empty text is the query for all.
func Parse(text string) (*Query, error) {
	if len(text) > maxText || !utf8.ValidString(text) {
		return nil, fmt.Errorf("more than %d octets, or no UTF-8", maxText)
	}
	if strings.TrimSpace(text) == "" {
		return &Query{}, nil
	}
	p := &parser{rest: text}
	p.next()
	if err := errors.Join(p.want("SELECT"), p.want("*")); err != nil {
		return nil, errors.New("want SELECT * FROM …: only whole documents are returned")
	}
	q := &Query{}
	if p.take("FROM") {
		if p.t.kind != word {
			return nil, p.unexpected("a name after FROM")
		}
		q.From = p.t.text
		p.next()
	}
	if p.take("WHERE") {
		var err error
		if q.where, err = p.or(0); err != nil {
			return nil, err
		}
	}
	if p.t.kind != end {
		return nil, p.unexpected("the end")
	}
	return q, nil
}

type tokenKind uint8

const (
	end    tokenKind = iota
	word             // a name, or a word of the language
	text             // a string literal; its text is without quotes
	number           // as it was written
	sign             // punctuation
	wrong            // what is no token
)

type token struct {
	kind tokenKind
	text string
}

type parser struct {
	rest string
	t    token // the next one
}

func letter(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '_' || c == '$' || c >= utf8.RuneSelf
}

func digit(c byte) bool { return '0' <= c && c <= '9' }

// next reads a token.
func (p *parser) next() {
	p.rest = strings.TrimLeft(p.rest, " \t\r\n")
	s := p.rest
	if s == "" {
		p.t = token{}
		return
	}
	n := 1
	kind := sign
	switch c := s[0]; {
	case letter(c):
		for kind = word; n < len(s) && (letter(s[n]) || digit(s[n]) || s[n] == '-'); n++ {
		}
	case digit(c) || c == '-':
		for kind = number; n < len(s) && (digit(s[n]) || letter(s[n]) || s[n] == '.' || (s[n] == '-' || s[n] == '+') && (s[n-1] == 'e' || s[n-1] == 'E')); n++ {
		}
	case c == '\'' || c == '"':
		var b strings.Builder
		for ; ; n++ {
			if n == len(s) {
				p.t, p.rest = token{wrong, s}, ""
				return
			}
			if s[n] == c {
				if n+1 == len(s) || s[n+1] != c {
					break
				}
				n++ // a quote that stands twice
			}
			b.WriteByte(s[n])
		}
		p.t, p.rest = token{text, b.String()}, s[n+1:]
		return
	case strings.HasPrefix(s, "<=") || strings.HasPrefix(s, ">=") || strings.HasPrefix(s, "<>") || strings.HasPrefix(s, "!="):
		n = 2
	case !strings.ContainsRune("()[],.=<>*", rune(c)):
		kind = wrong
	}
	p.t, p.rest = token{kind, s[:n]}, s[n:]
}

func (p *parser) unexpected(want string) error {
	if p.t.kind == end {
		return fmt.Errorf("it ends where %s belongs", want)
	}
	return fmt.Errorf("%.40q where %s belongs", p.t.text, want)
}

// take takes a word of the language, or a sign, if it is next.
func (p *parser) take(s string) bool {
	if p.t.kind == word && strings.EqualFold(p.t.text, s) || p.t.kind == sign && p.t.text == s {
		p.next()
		return true
	}
	return false
}

func (p *parser) want(s string) error {
	if !p.take(s) {
		return p.unexpected(s)
	}
	return nil
}

func (p *parser) or(depth int) (expr, error) {
	return p.joined("OR", depth, p.and, func(a, b truth) truth { return max(a, b) })
}

func (p *parser) and(depth int) (expr, error) {
	return p.joined("AND", depth, p.not, func(a, b truth) truth { return min(a, b) })
}

func (p *parser) joined(by string, depth int, part func(int) (expr, error), join func(a, b truth) truth) (expr, error) {
	var all []expr
	for more := true; more; more = p.take(by) {
		e, err := part(depth)
		if err != nil {
			return nil, err
		}
		all = append(all, e)
	}
	if len(all) == 1 {
		return all[0], nil
	}
	return func(doc map[string]any) truth {
		result := all[0](doc)
		for _, e := range all[1:] {
			result = join(result, e(doc))
		}
		return result
	}, nil
}

func (p *parser) not(depth int) (expr, error) {
	if depth++; depth > maxDepth {
		return nil, fmt.Errorf("more than %d levels", maxDepth)
	}
	switch {
	case p.take("NOT"):
		e, err := p.not(depth)
		return negated(e), err
	case p.take("("):
		e, err := p.or(depth)
		if err != nil {
			return nil, err
		}
		return e, p.want(")")
	case p.take("STARTSWITH"):
		return p.startsWith()
	case p.take("IS_DEFINED"):
		if err := p.want("("); err != nil {
			return nil, err
		}
		f, err := p.field()
		if err != nil {
			return nil, err
		}
		return func(doc map[string]any) truth { _, ok := f.in(doc); return is(ok) }, p.want(")")
	}
	return p.comparison()
}

func negated(e expr) expr { return func(doc map[string]any) truth { return -e(doc) } }

func (p *parser) startsWith() (expr, error) {
	if err := p.want("("); err != nil {
		return nil, err
	}
	f, err := p.field()
	if err != nil {
		return nil, err
	}
	if err := p.want(","); err != nil {
		return nil, err
	}
	if p.t.kind != text {
		return nil, p.unexpected("a text")
	}
	prefix := p.t.text
	p.next()
	return func(doc map[string]any) truth {
		v, _ := f.in(doc)
		got, ok := v.(string)
		if !ok {
			return unknown
		}
		if f.kind == folded {
			return is(strings.HasPrefix(dps.Fold(got), dps.Fold(prefix)))
		}
		return is(strings.HasPrefix(got, prefix))
	}, p.want(")")
}

// comparisons are what signs say of an order, and reversed those that say the same of it the other way round.
var (
	comparisons = map[string]func(int) bool{
		"=": func(c int) bool { return c == 0 }, "!=": func(c int) bool { return c != 0 }, "<>": func(c int) bool { return c != 0 },
		"<": func(c int) bool { return c < 0 }, "<=": func(c int) bool { return c <= 0 }, ">": func(c int) bool { return c > 0 }, ">=": func(c int) bool { return c >= 0 },
	}
	reversed = map[string]string{"<": ">", "<=": ">=", ">": "<", ">=": "<="}
)

func (p *parser) comparison() (expr, error) {
	f, left, err := p.operand()
	if err != nil {
		return nil, err
	}
	not := p.take("NOT")
	if p.take("IN") {
		e, err := p.in(f, left)
		if not && err == nil {
			e = negated(e)
		}
		return e, err
	}
	so := comparisons[p.t.text]
	if not || p.t.kind != sign || so == nil {
		return nil, p.unexpected("a comparison, or IN")
	}
	op := p.t.text
	p.next()
	g, right, err := p.operand()
	switch {
	case err != nil:
		return nil, err
	case (f == nil) == (g == nil):
		return nil, errors.New("a comparison is between a field and a literal")
	case f == nil:
		if r, ok := reversed[op]; ok {
			so = comparisons[r]
		}
		f, right = g, left
	}
	return f.test([]any{right}, reversed[op] != "", so)
}

// in reads what stands behind IN: a list for a field, or a field for a literal.
func (p *parser) in(f *field, left any) (expr, error) {
	equal := comparisons["="]
	if f == nil {
		g, err := p.field()
		if err != nil {
			return nil, err
		}
		return g.test([]any{left}, false, equal)
	}
	closing := ")"
	if !p.take("(") {
		if closing = "]"; !p.take("[") {
			return nil, p.unexpected("a list")
		}
	}
	var all []any
	for more := true; more; more = p.take(",") {
		if len(all) == maxList {
			return nil, fmt.Errorf("more than %d literals in a list", maxList)
		}
		g, v, err := p.operand()
		if err != nil {
			return nil, err
		}
		if g != nil {
			return nil, errors.New("a list is of literals")
		}
		all = append(all, v)
	}
	if err := p.want(closing); err != nil {
		return nil, err
	}
	return f.test(all, false, equal)
}

// operand reads a field or a literal.
func (p *parser) operand() (*field, any, error) {
	switch p.t.kind {
	case text:
		v := p.t.text
		p.next()
		return nil, v, nil
	case number:
		v, err := strconv.ParseFloat(p.t.text, 64)
		if err != nil || math.IsInf(v, 0) || math.IsNaN(v) || strings.ContainsAny(p.t.text, "xXpP_iInN") {
			return nil, nil, p.unexpected("a number")
		}
		p.next()
		return nil, v, nil
	case word:
		for name, v := range map[string]any{"true": true, "false": false, "null": nil} {
			if p.take(name) {
				return nil, v, nil
			}
		}
	}
	f, err := p.field()
	return f, nil, err
}

// field reads a field's name: words with dots between, and below tags and desired also ['…'].
func (p *parser) field() (*field, error) {
	if p.t.kind != word {
		return nil, p.unexpected("a field or a literal")
	}
	names := []string{p.t.text}
	p.next()
	for len(names) <= maxDepth {
		switch {
		case p.take("."):
			if p.t.kind != word {
				return nil, p.unexpected("a name")
			}
			names = append(names, p.t.text)
			p.next()
		case p.take("["):
			if p.t.kind != text {
				return nil, p.unexpected("a name in quotes")
			}
			names = append(names, p.t.text)
			p.next()
			if err := p.want("]"); err != nil {
				return nil, err
			}
		default:
			return newField(names)
		}
	}
	return nil, fmt.Errorf("a field of more than %d names", maxDepth)
}
