package hub

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/touchmark/touchmark/pkg/registration"
)

// mosquitto keeps the clients of a broker's dynamic security plugin: for each device a client of its ID and a role, whose ACLs are for
// devices/{id}/#. The plugin of 2.0 knows no patterns with the client's name in them, so that one role for all would not do. Its MQTT
// client ID must be its own ID too: by that of another it would put that off the broker.
//
// A client has what the plugin has no place for, and by which we know ours from others, as JSON in its text description. Clients
// without that are none of ours: a device named as the broker's administrator is shall not have its password.
type mosquitto struct{ *broker }

func newMosquitto(cfg Config, conn *Connection) *mosquitto {
	return &mosquitto{newBroker(cfg, conn)}
}

// description is the JSON in a client's text description.
type description struct {
	Touchmark      int      `json:"touchmark"` // 1; none of ours without
	RegistrationID string   `json:"registrationId,omitempty"`
	Group          string   `json:"group,omitempty"`
	Thumbprints    []string `json:"thumbprints,omitempty"` // for who reads them: the broker goes by chain and common name
	IoTEdge        bool     `json:"iotEdge,omitempty"`
	Parent         string   `json:"parent,omitempty"`
	// Key is by what one sees that the password is the same: a part of its HMAC. The password itself is a key of 128 bits or more.
	Key string `json:"key,omitempty"`
	// Pending is a client whose making did not come to its end.
	Pending bool `json:"pending,omitempty"`
}

func (d description) text() string {
	b, _ := json.Marshal(d) // of strings and flags alone
	return string(b)
}

func describe(d *registration.HubDevice) description {
	is := description{Touchmark: 1, RegistrationID: d.RegistrationID, Group: d.Group, Thumbprints: d.Thumbprints, IoTEdge: d.IoTEdge, Parent: d.Parent}
	if d.Keys != nil {
		mac := hmac.New(sha256.New, []byte(d.Keys.PrimaryKey))
		mac.Write([]byte("touchmark client " + d.ID))
		is.Key = hex.EncodeToString(mac.Sum(nil)[:16])
	}
	return is
}

// client is what the plugin tells of one.
type client struct {
	Username    string `json:"username"`
	ClientID    string `json:"clientid"`
	Description string `json:"textdescription"`
	Disabled    bool   `json:"disabled"`
	Roles       []role `json:"roles"`
	description `json:"-"`
}

// Names of what the plugin keeps.
func roleName(id string) string { return "touchmark:" + id }

const textName = "touchmark"

// id refuses IDs that would be more than one level of a topic, or that later plugins take for a pattern.
func (h *mosquitto) id(id string) error {
	err := checkID(id)
	if err == nil && strings.ContainsAny(id, "+#/%") {
		err = fmt.Errorf("device %.128q: a broker's device IDs have no + # / %%", id)
	}
	if err != nil {
		return newError(h.name, codeArgument, false, err)
	}
	return nil
}

// Check asks for the default access, which must not give devices the topics of others.
func (h *mosquitto) Check(ctx context.Context) error {
	const doing = "reading the default access"
	results, err := h.run(ctx, doing, command{Command: "getDefaultACLAccess"})
	if err != nil {
		return err
	}
	if results[0].Error != "" {
		return h.failed(doing, results[0])
	}
	var data struct {
		ACLs []acl `json:"acls"`
	}
	if err := decode(results[0].Data, &data, false); err != nil {
		return newError(h.name, codeInvalid, false, fmt.Errorf("%s: %w", doing, err))
	}
	for _, a := range data.ACLs {
		if a.Allow && (a.Type == "publishClientSend" || a.Type == "subscribe") {
			return newError(h.name, "DefaultAccess", false, fmt.Errorf("everybody may do %s there by default: have it false in defaultACLAccess of the plugin's file", a.Type))
		}
	}
	return nil
}

// get returns the client of a device; one of somebody else's is foreign.
func (h *mosquitto) get(ctx context.Context, id string) (c *client, foreign bool, err error) {
	if err := h.id(id); err != nil {
		return nil, false, err
	}
	doing := "reading client " + strconv.Quote(id)
	results, err := h.run(ctx, doing, command{Command: "getClient", Username: id})
	if err != nil {
		return nil, false, err
	}
	if results[0].Error == "Client not found" {
		return nil, false, notFound(h.name, id, 0)
	}
	if results[0].Error != "" {
		return nil, false, h.failed(doing, results[0])
	}
	c, err = parseClient(results[0].Data, id)
	if err != nil {
		return nil, false, newError(h.name, codeInvalid, false, fmt.Errorf("%s: %w", doing, err))
	}
	return c, c.Touchmark != 1, nil
}

// parseClient reads the plugin's answer to getClient; untrusted.
func parseClient(data []byte, id string) (*client, error) {
	var got struct {
		Client client `json:"client"`
	}
	if err := decode(data, &got, false); err != nil {
		return nil, err
	}
	if got.Client.Username != id {
		return nil, fmt.Errorf("it is of client %.128q", got.Client.Username)
	}
	if decode([]byte(got.Client.Description), &got.Client.description, true) != nil {
		got.Client.description = description{} // somebody else's
	}
	return &got.Client, nil
}

// Device reads the client.
func (h *mosquitto) Device(ctx context.Context, id string) (*registration.HubDevice, error) {
	c, foreign, err := h.get(ctx, id)
	if err == nil && (foreign || c.Pending) {
		err = notFound(h.name, id, 0)
	}
	if err != nil {
		return nil, err
	}
	return &registration.HubDevice{ID: id, Disabled: c.Disabled, Thumbprints: c.Thumbprints, IoTEdge: c.IoTEdge, Parent: c.Parent,
		RegistrationID: c.RegistrationID, Group: c.Group}, nil
}

// Admit makes the client and its role, or brings them up to date. A client that changes is put off the broker, and comes again.
func (h *mosquitto) Admit(ctx context.Context, d *registration.HubDevice) (created bool, err error) {
	if err := checkDevice(h.name, d); err != nil {
		return false, err
	}
	is := describe(d)
	for range attempts {
		c, foreign, err := h.get(ctx, d.ID)
		switch {
		case isNotFound(err):
			c, err = h.create(ctx, d)
			if err != nil {
				return false, err
			}
			if c == nil {
				continue // somebody was quicker
			}
			created = true
			if !d.Disabled {
				return true, nil
			}
		case err != nil:
			return false, err
		case foreign:
			return false, newError(h.name, "ClientNotOurs", false, fmt.Errorf("client %q of the broker is not of our making, and is left alone", d.ID))
		case c.Pending:
			created = true
			c.Disabled = d.Disabled
		}
		// An X.509 device's listener does not ask the plugin whether it may connect: without its role it may do nothing there.
		bare := c.Disabled && d.Keys == nil
		roles := slices.DeleteFunc(c.Roles, func(r role) bool { return r.Name == roleName(d.ID) })
		had := len(roles) < len(c.Roles)
		if !created && c.description.text() == is.text() && had != bare && c.ClientID == d.ID {
			return false, nil
		}
		if !bare {
			roles = append(roles, role{Name: roleName(d.ID)})
		}
		modify := command{Command: "modifyClient", Username: d.ID, ClientID: d.ID, Description: is.text(), Roles: roles}
		if created || c.Key != is.Key {
			modify.Password = password(d)
		}
		gone, err := h.do(ctx, "changing client "+strconv.Quote(d.ID), modify, c.Disabled && created, d.ID)
		if err != nil {
			return false, err
		}
		if !gone {
			return created, nil
		}
		created = false
	}
	return false, newError(h.name, codeConflict, true, fmt.Errorf("admitting client %q: it was changed by somebody else %d times", d.ID, attempts))
}

// do changes a client, disabling it first where it is new and to be so, and with its role in place.
func (h *mosquitto) do(ctx context.Context, doing string, modify command, disable bool, id string) (gone bool, err error) {
	commands := []command{createRole(id)}
	if disable {
		commands = append(commands, command{Command: "disableClient", Username: id})
	}
	results, err := h.run(ctx, doing, append(commands, modify)...)
	if err != nil {
		return false, err
	}
	for _, r := range results {
		switch r.Error {
		case "", "Role already exists":
		case "Client not found", "Role not found":
			return true, nil
		default:
			return false, h.failed(doing, r)
		}
	}
	return false, nil
}

// create makes a client. One that is to be disabled cannot be made so: it is made pending, with neither password nor role. The client is
// nil where there was one all of a sudden.
func (h *mosquitto) create(ctx context.Context, d *registration.HubDevice) (*client, error) {
	is := describe(d)
	c := command{Command: "createClient", Username: d.ID, ClientID: d.ID, Name: textName}
	if d.Disabled {
		is = description{Touchmark: 1, Pending: true}
	} else {
		c.Password, c.Roles = password(d), []role{{Name: roleName(d.ID)}}
	}
	c.Description = is.text()
	doing := "creating client " + strconv.Quote(d.ID)
	results, err := h.run(ctx, doing, createRole(d.ID), c)
	if err != nil {
		return nil, err
	}
	if e := results[0].Error; e != "" && e != "Role already exists" {
		return nil, h.failed(doing, results[0])
	}
	switch results[1].Error {
	case "":
		return &client{description: is, Roles: c.Roles, Disabled: d.Disabled}, nil
	case "Client already exists", "Role not found":
		return nil, nil
	}
	return nil, h.failed(doing, results[1])
}

// createRole has a device publish, subscribe and receive below devices/{id}/, and nowhere else.
func createRole(id string) command {
	topic := "devices/" + id + "/#"
	c := command{Command: "createRole", RoleName: roleName(id), Name: textName}
	for _, t := range []string{"publishClientSend", "publishClientReceive", "subscribePattern", "unsubscribePattern"} {
		c.ACLs = append(c.ACLs, acl{Type: t, Topic: topic, Allow: true})
	}
	return c
}

// password is what a device logs in with: its primary key as it stands, or what nobody knows where a certificate does that.
func password(d *registration.HubDevice) string {
	if d.Keys != nil {
		return d.Keys.PrimaryKey
	}
	return rand.Text()
}

// Remove deletes the client and its role.
func (h *mosquitto) Remove(ctx context.Context, id string) error {
	_, foreign, err := h.get(ctx, id)
	if isNotFound(err) || foreign {
		return nil
	}
	if err != nil {
		return err
	}
	doing := "deleting client " + strconv.Quote(id)
	results, err := h.run(ctx, doing, command{Command: "deleteClient", Username: id}, command{Command: "deleteRole", RoleName: roleName(id)})
	if err != nil {
		return err
	}
	for _, r := range results {
		if r.Error != "" && r.Error != "Client not found" && r.Error != "Role not found" {
			return h.failed(doing, r)
		}
	}
	return nil
}

// Twin is empty: a broker has none.
func (h *mosquitto) Twin(ctx context.Context, id string) (*registration.HubTwin, error) {
	if _, err := h.Device(ctx, id); err != nil {
		return nil, err
	}
	return &registration.HubTwin{}, nil
}

// MergeTwin does nothing.
func (h *mosquitto) MergeTwin(context.Context, string, *registration.HubTwin) error { return nil }
