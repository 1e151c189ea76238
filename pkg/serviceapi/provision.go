package serviceapi

import (
	"strings"

	"github.com/touchmark/touchmark/pkg/registration"
)

// outbox lists what hubs have yet to be told.
func (c *call) outbox() (any, error) {
	return c.list("Task", false, func(p registration.Page) ([]any, string, error) {
		return anyRows(c.svc.Tasks(c.ctx(), p.After, p.Limit))
	})
}

// orphans lists devices that a hub could not be asked to forget.
func (c *call) orphans() (any, error) {
	return c.list("Orphan", false, func(p registration.Page) ([]any, string, error) {
		var after registration.Orphan
		if at := strings.Split(p.After, "\x00"); len(at) == 3 {
			after.ID, after.Hub, after.DeviceID = at[0], at[1], at[2]
		}
		page, err := c.svc.Orphans(c.ctx(), after, p.Limit)
		next := ""
		if len(page) == p.Limit {
			last := page[len(page)-1]
			next = strings.Join([]string{last.ID, last.Hub, last.DeviceID}, "\x00")
		}
		return anyRows(page, next, err)
	})
}

// forgetOrphan takes one off that list: of a registration ID, at the hub and by the device ID of the query.
func (c *call) forgetOrphan() (any, error) {
	q := c.r.URL.Query()
	return nil, c.svc.ForgetOrphan(c.ctx(), &registration.Orphan{ID: c.ids[0], Hub: q.Get("hub"), DeviceID: q.Get("deviceId")}, c.by)
}

// children lists the devices that are below an edge device, or wait to be.
func (c *call) children() (any, error) {
	return c.list("Child", false, func(p registration.Page) ([]any, string, error) {
		return anyRows(c.svc.Children(c.ctx(), c.ids[0], p.After, p.Limit))
	})
}
