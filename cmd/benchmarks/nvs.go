package main

import (
	"crypto/sha256"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"time"

	"github.com/touchmark/touchmark/pkg/stamp/nvs"
)

//go:embed nvs.py
var espressifNVS string

// nvs-images: NVS partitions of 12 KiB with a certificate, a key and four values, on one core; against Espressif's generator
// in one process of its own, which is given the values and not a CSV file, and whose start is not counted.
func (b *bench) nvsImages() {
	dir := os.Getenv("TOUCHMARK_ESP_NVS")
	if dir == "" || dir == "none" {
		fmt.Fprintln(os.Stderr, "nvs-images: not measured: Espressif's generator is absent (TOUCHMARK_ESP_NVS=$(scripts/espressif-nvs))")
		return
	}
	octets := make([]byte, 900)
	for i := range octets {
		octets[i] = byte(i)
	}
	var entries []nvs.Entry
	for _, v := range []struct {
		key   string
		value any
	}{{"certificate", octets}, {"key", octets[:240]}, {"serial", "SN00000001"}, {"scope", "0ne00112233"},
		{"endpoint", "global.azure-devices-provisioning.net"}, {"version", uint32(1)}} {
		entries = append(entries, nvs.Entry{Namespace: "identity", Key: v.key, Value: v.value})
	}
	var image []byte
	b.compare("nvs-images", "images/s", func() float64 {
		n := 20000 * b.scale
		start := time.Now()
		for range n {
			image = must(nvs.Build(image[:0], nvs.MinSize, entries, nil))
		}
		return float64(n) / time.Since(start).Seconds()
	}, func() float64 {
		out := must(exec.Command("/usr/bin/python3", "-c", espressifNVS, dir, strconv.Itoa(200*b.scale)).Output())
		var rate float64
		var sum string
		must(fmt.Sscan(string(out), &rate, &sum))
		if sum != fmt.Sprintf("%x", sha256.Sum256(must(nvs.Build(nil, nvs.MinSize, entries, nil)))) {
			check(fmt.Errorf("nvs-images: Espressif's generator writes another image"))
		}
		return rate
	})
}
