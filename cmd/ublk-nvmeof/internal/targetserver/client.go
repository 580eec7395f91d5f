package targetserver

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/internal/rundir"
)

// namePrefix begins the names of targets.
const namePrefix = "target"

// List finds the names of the targets that run, in order, and takes away what dead ones
// left.
func List(runDir string) ([]string, error) { return rundir.Places(runDir, namePrefix) }

// Socket is the control socket of a target.
func Socket(runDir, name string) string { return filepath.Join(runDir, name, "control.sock") }

// Client talks to a target.
//
//	GET  /v1/status            → 200 Status
//	POST /v1/grant … /v1/stop  → 200 Done once it has happened, or an exit.Error
type Client struct{ client *control.Client }

// NewClient returns a client for a control socket. It does not connect yet.
func NewClient(socket string) *Client { return &Client{control.NewClient(socket)} }

// Status returns the status of the target.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	err := c.client.Do(ctx, http.MethodGet, "/v1/status", nil, &s)
	if err == nil && s.SchemaVersion != SchemaVersion {
		err = fmt.Errorf("get status: schema version %d is not %d", s.SchemaVersion, SchemaVersion)
	}
	return s, err
}

// path returns the URL path of a request.
func path(request any) string {
	switch request.(type) {
	case GrantRequest:
		return "/v1/grant"
	case DropRequest:
		return "/v1/drop"
	case StallRequest:
		return "/v1/stall"
	case FreezeRequest:
		return "/v1/freeze"
	case HideRequest:
		return "/v1/namespace/hide"
	case FaultRequest:
		return "/v1/fault"
	case UnfaultRequest:
		return "/v1/unfault"
	case RejectRequest:
		return "/v1/reject"
	case RefuseRequest:
		return "/v1/refuse"
	case ANARequest:
		return "/v1/ana"
	case AddRequest:
		return "/v1/namespace/add"
	case RemoveRequest:
		return "/v1/namespace/remove"
	case ResizeRequest:
		return "/v1/namespace/resize"
	case ReadOnlyRequest:
		return "/v1/namespace/read-only"
	case ReferralRequest:
		return "/v1/referral"
	case AuthRequest:
		return "/v1/auth"
	case StopRequest:
		return "/v1/stop"
	}
	panic(fmt.Sprintf("no path for %T", request))
}

// Do sends one of the requests and waits until it has been carried out. The error is an
// *exit.Error if the target refused the request.
func (c *Client) Do(ctx context.Context, request any) (Done, error) {
	var d Done
	err := c.client.Do(ctx, http.MethodPost, path(request), request, &d)
	return d, err
}
