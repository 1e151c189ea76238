package registration

import (
	"context"
	"encoding/json"

	"github.com/touchmark/touchmark/pkg/dps"
)

// maxBulk is how many items a bulk operation has at most (service API, section 1.9).
const maxBulk = 10

// Bulk does something with up to ten enrollments or groups, one after the other: each by itself, whatever becomes of the others.
func (s *Service) Bulk(ctx context.Context, by Actor, kind Kind, body []byte) (*dps.BulkResult, error) {
	return s.bulk(ctx, by, kind, body, false)
}

// Judge answers as Bulk would that creates the items, or puts those with an etag in the place of that version, and writes nothing. What
// items are to one another does not count, nor do quotas.
func (s *Service) Judge(ctx context.Context, by Actor, kind Kind, body []byte) (*dps.BulkResult, error) {
	return s.bulk(ctx, by, kind, body, true)
}

func (s *Service) bulk(ctx context.Context, by Actor, kind Kind, body []byte, judge bool) (*dps.BulkResult, error) {
	var op dps.BulkOperation
	if err := json.Unmarshal(body, &op); err != nil {
		return nil, dps.NewError(dps.CodeInvalidArgument, "The body is not a valid bulk operation", err)
	}
	items := op.Enrollments
	if kind == Group {
		items = op.EnrollmentGroups
	}
	if len(items) < 1 || len(items) > maxBulk || op.Mode == "" && !judge {
		return nil, invalid("A bulk operation needs a mode, and 1 to %d items", maxBulk)
	}
	res := &dps.BulkResult{Errors: []dps.BulkError{}}
	for _, item := range items {
		id, err := s.bulkItem(ctx, by, kind, op.Mode, item, judge)
		if err == nil {
			continue
		}
		if ctx.Err() != nil {
			return nil, err
		}
		e := dps.AsError(err)
		if e.Code.Status() >= 500 {
			s.cfg.Log.Error("internal error", "operation", "bulk "+string(op.Mode), "id", clip(id), "trackingId", e.TrackingID, "cause", e.Error(), "remote", by.Remote)
		}
		row := dps.BulkError{RegistrationID: clip(id), ErrorCode: e.Code, ErrorStatus: e.Message}
		if kind == Group {
			row.RegistrationID, row.EnrollmentGroupID = "", row.RegistrationID
		}
		res.Errors = append(res.Errors, row)
	}
	res.IsSuccessful = len(res.Errors) == 0
	return res, nil
}

// bulkItem does one item, and returns its ID as far as it can be told.
func (s *Service) bulkItem(ctx context.Context, by Actor, kind Kind, mode dps.BulkMode, item json.RawMessage, judge bool) (id string, err error) {
	var name struct {
		RegistrationID    string `json:"registrationId"`
		EnrollmentGroupID string `json:"enrollmentGroupId"`
		ETag              string `json:"etag"`
	}
	if err := json.Unmarshal(item, &name); err != nil {
		return "", dps.NewError(dps.CodeInvalidArgument, "The item is not a valid enrollment", err)
	}
	if id = name.RegistrationID; kind == Group {
		id = name.EnrollmentGroupID
	}
	if id == "" {
		return "", invalid("The item has no ID")
	}
	switch {
	case judge:
	case mode == dps.BulkDelete:
		return id, s.DeleteEnrollment(ctx, by, kind, id, name.ETag)
	case mode == dps.BulkCreate:
		name.ETag = ""
	case mode == dps.BulkUpdateIfMatchETag && name.ETag == "":
		return id, invalid("The item has no etag")
	case name.ETag == "": // an update without a tag fails as a creation does: so the service answers
		if _, err := s.show(ctx, kind, id, false); err != nil {
			return id, err
		}
		return id, taken(kind)
	}
	in, err := parseSent(kind, item)
	if err == nil {
		in.judged = judge
		_, err = s.put(ctx, by, in, name.ETag)
	}
	return id, err
}
