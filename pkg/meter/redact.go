package meter

import (
	"fmt"
	"log/slog"
	"regexp"
	"strings"

	"github.com/touchmark/touchmark/pkg/registration"
)

var (
	query  = regexp.MustCompile(`(https?://[^\s"?#]*)\?[^\s"]*`)
	user   = regexp.MustCompile(`(https?://)[^\s"/@]+@`)
	secret = regexp.MustCompile(`(?i)\b(sig|sharedaccesskey|primarykey|secondarykey|authorization|password)("?\s*[=:]\s*"?)[^&;,\s"]+`)
)

// Redact returns a ReplaceAttr for [slog.HandlerOptions] that keeps out of the log what could be secret by its form: the query
// of a URL, where webhooks have their keys; who a URL names before its host; signatures and keys of tokens and connection
// strings. What packages log has none of them to begin with; the errors of others may. With mask, callers' addresses are cut to
// their network.
func Redact(mask bool) func(groups []string, a slog.Attr) slog.Attr {
	return func(_ []string, a slog.Attr) slog.Attr {
		var text string
		switch a.Value.Kind() {
		case slog.KindString:
			text = a.Value.String()
		case slog.KindAny:
			switch v := a.Value.Any().(type) {
			case error:
				text = v.Error()
			case fmt.Stringer:
				text = v.String()
			case string:
				text = v
			default:
				return a
			}
		default:
			return a
		}
		if mask && (a.Key == "remote" || a.Key == "proxy") {
			return slog.String(a.Key, registration.MaskAddress(text))
		}
		if strings.Contains(text, "://") {
			text = user.ReplaceAllString(query.ReplaceAllString(text, "$1?[redacted]"), "$1[redacted]@")
		}
		if strings.ContainsAny(text, "=:") {
			text = secret.ReplaceAllString(text, "$1$2[redacted]")
		}
		return slog.String(a.Key, text)
	}
}
