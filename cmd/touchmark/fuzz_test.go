package main

import (
	"strings"
	"testing"
	"time"
)

func FuzzConnectionString(f *testing.F) {
	f.Add("HostName=dps.example.net:8443;SharedAccessKeyName=owner;SharedAccessKey=AAAA\n")
	f.Add("hostname=[::1]:443;sharedaccesskeyname=o;sharedaccesskey=AAAA;x")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseConnectionString(text)
		if err != nil {
			return
		}
		token := s.token(time.Unix(1, 0))
		if s.host == "" || len(s.key) == 0 || strings.ContainsAny(token, "\r\n") {
			t.Fatalf("%q gives %q, %q", text, s.host, token)
		}
	})
}
