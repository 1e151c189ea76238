package registration

import "context"

// HoldSearches keeps searches from beginning until release is called.
func (s *Service) HoldSearches(ctx context.Context) (release func(), err error) {
	n := int64(searchCores())
	return func() { s.searcher.cores.Release(n) }, s.searcher.cores.Acquire(ctx, n)
}

// Searches returns how many searches there are, and how many there may be.
func (s *Service) Searches() (now, most int) { return int(s.searcher.asking.Load()), maxSearches }

// What a cache of groups may hold.
const (
	MaxStrangers = maxStrangers
	TryAtOnce    = tryAtOnce
)

// Strangers returns how many issuers are kept that are nobody's.
func (s *Service) Strangers() int {
	s.groups.mu.RLock()
	defer s.groups.mu.RUnlock()
	return len(s.groups.strangers)
}

// Listed is what pages are made of, and PageOf makes one.
type Listed = listed

func NewListed(id string, v any, octets int) Listed { return listed{id, v, octets} }

var PageOf = page

// AdviceOn is what is said about a rule.
func AdviceOn(rule string) string { return adviceOn[rule] }

// RuleOf names the rule that a refusal is by.
func RuleOf(err error) string { return ruleOf(err) }
