package operator

import "time"

// Authorization is what the client sends.
func (c *Connection) Authorization(now time.Time) string { return c.authorization(now) }
