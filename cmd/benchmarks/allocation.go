package main

import (
	"crypto/sha256"
	"fmt"
	"time"

	"github.com/touchmark/touchmark/pkg/allocation"
)

// allocation: nanoseconds to choose a device's hub among 2, 10 and 50, against as many hashes of as many octets.
func (b *bench) allocation() {
	for _, n := range []int{2, 10, 50} {
		hubs := make([]allocation.Hub, n)
		for i := range hubs {
			hubs[i] = allocation.Hub{Name: fmt.Sprintf("hub-%02d.example.net", i), Weight: 1 + i%7}
		}
		decisions := 20000 * b.scale / n
		spent := func(f func(i int)) float64 {
			start := time.Now()
			for i := range decisions {
				f(i)
			}
			return float64(time.Since(start).Nanoseconds()) / float64(decisions)
		}
		ids := make([]string, 1000)
		for i := range ids {
			ids[i] = fmt.Sprintf("pump-%07d", i)
		}
		var sum [sha256.Size]byte
		text := make([]byte, len(hubs[0].Name)+1+len(ids[0]))
		b.compare(fmt.Sprintf("allocation-%d", n), "ns", func() float64 {
			return spent(func(i int) { sum[0] ^= byte(allocation.Hashed(ids[i%len(ids)], hubs)) })
		}, func() float64 {
			return spent(func(i int) {
				for range hubs {
					text[0] ^= sum[0]
					sum = sha256.Sum256(text)
				}
			})
		})
	}
}
