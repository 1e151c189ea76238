package arm

import (
	"net/http"
	"slices"
	"strings"

	"github.com/touchmark/touchmark/pkg/registration"
)

// A connection is a private endpoint connection on the wire (service API, section 3.7). Here it is a record, and does nothing: who
// may come in is for IP rules and publicNetworkAccess to say.
type connection struct {
	ID         string               `json:"id"`
	Name       string               `json:"name"`
	Type       string               `json:"type"`
	Properties connectionProperties `json:"properties"`
}

type connectionProperties struct {
	PrivateEndpoint *endpointID      `json:"privateEndpoint,omitempty"`
	State           *connectionState `json:"privateLinkServiceConnectionState"`
}

type endpointID struct {
	ID string `json:"id"`
}

type connectionState struct {
	Status          string `json:"status"`
	Description     string `json:"description"`
	ActionsRequired string `json:"actionsRequired,omitempty"`
}

const maxConnections = 100

func connections(sc *registration.Scope) []connection {
	all := []connection{}
	for _, e := range sc.PrivateEndpoints {
		c := connection{serviceID(sc) + "/privateEndpointConnections/" + e.Name, e.Name, resourceType + "/PrivateEndpointConnections",
			connectionProperties{State: &connectionState{e.Status, e.Description, e.ActionsRequired}}}
		if e.Endpoint != "" {
			c.Properties.PrivateEndpoint = &endpointID{e.Endpoint}
		}
		all = append(all, c)
	}
	return all
}

// privateEndpoints answers what is at a service's private endpoint connections.
func (c *call) privateEndpoints(sc *registration.Scope) (*answer, error) {
	name := c.next()
	if name == "" {
		if err := c.method(http.MethodGet); err != nil {
			return nil, err
		}
		return ok(connections(sc)), nil // a bare array
	}
	if !word(name, 1, 80, "-._") {
		return nil, bad("Private endpoint connection %.100q: want a name of 1 to 80 letters, digits and -._", name)
	}
	if err := c.method(http.MethodGet, http.MethodPut, http.MethodDelete); err != nil {
		return nil, err
	}
	named := func(e registration.PrivateEndpoint) bool { return strings.EqualFold(e.Name, name) }
	shown := func(sc *registration.Scope) connection {
		return connections(sc)[slices.IndexFunc(sc.PrivateEndpoints, named)]
	}
	if c.r.Method != http.MethodPut && !slices.ContainsFunc(sc.PrivateEndpoints, named) {
		if c.r.Method == http.MethodDelete {
			return &answer{http.StatusNoContent, nil}, nil
		}
		return nil, nothing("The private endpoint connection " + name)
	}
	if c.r.Method == http.MethodGet {
		return ok(shown(sc)), nil
	}
	var put *registration.PrivateEndpoint
	if c.r.Method == http.MethodPut {
		var in connection
		if err := c.body(&in); err != nil {
			return nil, err
		}
		st := in.Properties.State
		if st == nil || st.Description == "" {
			return nil, bad("privateLinkServiceConnectionState needs status and description")
		}
		put = &registration.PrivateEndpoint{Name: name, Description: st.Description, ActionsRequired: st.ActionsRequired}
		for _, s := range []string{"Pending", "Approved", "Rejected", "Disconnected"} {
			if strings.EqualFold(s, st.Status) {
				put.Status = s
			}
		}
		if in.Properties.PrivateEndpoint != nil {
			put.Endpoint = in.Properties.PrivateEndpoint.ID
		}
		if put.Status == "" || len(put.Description)+len(put.ActionsRequired)+len(put.Endpoint) > 4096 {
			return nil, bad("status must be Pending, Approved, Rejected or Disconnected, and all texts together not longer than 4096 octets")
		}
	}
	status := http.StatusOK
	action := "put private endpoint"
	if put == nil {
		action = "delete private endpoint"
	}
	_, is, err := registration.EditScope(c.r.Context(), c.store, sc.ID, c.by, action, c.cfg.Now(), func(sc *registration.Scope) (*registration.Scope, error) {
		if sc == nil || sc.Deleting {
			return nil, conflict("The provisioning service is being deleted.")
		}
		all := slices.Clone(sc.PrivateEndpoints)
		i := slices.IndexFunc(all, named)
		switch {
		case put == nil:
			all = slices.DeleteFunc(all, named)
		case i >= 0:
			all[i] = *put
			status = http.StatusOK
		case len(all) >= maxConnections:
			return nil, bad("A service has %d private endpoint connections at most", maxConnections)
		default:
			all, status = append(all, *put), http.StatusCreated
		}
		sc.PrivateEndpoints = all
		return sc, nil
	})
	switch {
	case err != nil:
		return nil, err
	case put == nil:
		return &answer{http.StatusNoContent, nil}, nil
	}
	return &answer{status, shown(is)}, nil
}

// privateLinks answers which resources could be linked to: one, in name.
func (c *call) privateLinks(sc *registration.Scope) (*answer, error) {
	if err := c.method(http.MethodGet); err != nil {
		return nil, err
	}
	const group = "iotDps"
	type linkProperties struct {
		GroupID           string   `json:"groupId"`
		RequiredMembers   []string `json:"requiredMembers"`
		RequiredZoneNames []string `json:"requiredZoneNames"`
	}
	resource := struct {
		ID         string         `json:"id"`
		Name       string         `json:"name"`
		Type       string         `json:"type"`
		Properties linkProperties `json:"properties"`
	}{serviceID(sc) + "/privateLinkResources/" + group, group, resourceType + "/PrivateLinkResources",
		linkProperties{group, []string{group}, []string{"privatelink.azure-devices-provisioning.net"}}}
	switch name := c.next(); {
	case name == "":
		return ok(list{[]any{resource}, nil}), nil
	case strings.EqualFold(name, group):
		return ok(resource), nil
	}
	return nil, nothing("The private link resource")
}
