package registration_test

import (
	"fmt"
	"testing"

	"github.com/touchmark/touchmark/pkg/registration"
)

// A page is bounded in what it looks at and in how large it is, and goes on where it stopped: every row comes once.
func TestPages(t *testing.T) {
	const rows = 25_000
	read := func(octets int) func(string, int) ([]registration.Listed, error) {
		return func(after string, limit int) (batch []registration.Listed, err error) {
			from := 0
			if after != "" {
				_, err = fmt.Sscanf(after, "%d", &from)
				from++
			}
			for i := from; i < min(from+limit, rows); i++ {
				batch = append(batch, registration.NewListed(fmt.Sprintf("%05d", i), i, octets))
			}
			return batch, err
		}
	}
	every := func(n int) func(any) (bool, error) {
		return func(v any) (bool, error) { return v.(int)%n == n-1, nil }
	}
	for name, x := range map[string]struct {
		page   registration.Page
		octets int
		want   []int // sizes of the first pages
		total  int
	}{
		"all":               {registration.Page{Limit: 1000}, 10, []int{1000, 1000, 1000}, rows},
		"exactly":           {registration.Page{Limit: rows / 5}, 10, []int{5000, 5000, 5000, 5000, 5000}, rows},
		"few that match":    {registration.Page{Limit: 1000, Match: every(10_000)}, 10, []int{1, 1, 0}, 2},
		"none that match":   {registration.Page{Limit: 1000, Match: every(1_000_000)}, 10, []int{0, 0, 0}, 0},
		"many that match":   {registration.Page{Limit: 10, Match: every(2)}, 10, []int{10, 10, 10}, rows / 2},
		"large":             {registration.Page{Limit: 1000}, 1 << 20, []int{8, 8, 8}, rows},
		"large, one by one": {registration.Page{Limit: 1}, 16 << 20, []int{1, 1, 1}, rows},
	} {
		p := x.page
		total, pages := 0, 0
		for {
			got, next, err := registration.PageOf(p, read(x.octets))
			if err != nil {
				t.Fatal(err)
			}
			if pages < len(x.want) && len(got) != x.want[pages] {
				t.Errorf("%s: page %d has %d rows, not %d", name, pages, len(got), x.want[pages])
			}
			for _, v := range got {
				if p.Match == nil && v != total {
					t.Fatalf("%s: row %v where %d belongs", name, v, total)
				}
				total++
			}
			pages++
			if next == "" {
				break
			}
			p.After = next
		}
		if total != x.total {
			t.Errorf("%s: %d rows of %d", name, total, x.total)
		}
	}
}
