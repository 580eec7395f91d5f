package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"syscall"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// Client talks to the server behind a socket, one request per call.
type Client struct{ http http.Client }

// maxAnswer is far above the status of a server with 1024 namespaces.
const maxAnswer = 16 << 20

// NewClient does not connect yet.
func NewClient(socket string) *Client {
	return &Client{http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}}
}

// Gone says that err means that there is no server behind the socket.
func Gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// Status asks for the status.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	err := c.Do(ctx, http.MethodGet, "/v1/status", nil, &s)
	if err == nil && s.SchemaVersion != SchemaVersion {
		err = fmt.Errorf("get status: schema version %d is not %d", s.SchemaVersion, SchemaVersion)
	}
	return s, err
}

// Disconnect has the server end everything, and returns when that is done. The
// error is an *exit.Error if the server refused.
func (c *Client) Disconnect(ctx context.Context, force bool) error {
	return c.Do(ctx, http.MethodPost, "/v1/disconnect", disconnectRequest{force}, nil)
}

// HandOver has the server leave its devices to another one, and end. If sessions is not empty, it
// is the path of a socket on which the other server receives the sessions of front ends.
func (c *Client) HandOver(ctx context.Context, sessions string) error {
	return c.Do(ctx, http.MethodPost, "/v1/handover", handOverRequest{sessions}, nil)
}

// Replace has a server that a service manager runs start program in its place. It returns
// the process id of the new server when that has begun to take over.
func (c *Client) Replace(ctx context.Context, program string) (pid int, err error) {
	var a replaceAnswer
	err = c.Do(ctx, http.MethodPost, "/v1/replace", replaceRequest{program}, &a)
	return a.PID, err
}

// Query asks the controller. The error is an *exit.Error if the server or the controller
// refused.
func (c *Client) Query(ctx context.Context, q Query) (QueryResult, error) {
	var a QueryResult
	err := c.Do(ctx, http.MethodPost, "/v1/query", q, &a)
	if err == nil && len(a.Data) != q.Length {
		err = fmt.Errorf("ask server: it answered with %d bytes of %d", len(a.Data), q.Length)
	}
	return a, err
}

// Reserve sends a reservation command, and returns the data of a report.
func (c *Client) Reserve(ctx context.Context, r Reservation) ([]byte, error) {
	var a QueryResult
	err := c.Do(ctx, http.MethodPost, "/v1/reservation", r, &a)
	if err == nil && len(a.Data) != len(r.Data) {
		err = fmt.Errorf("ask server: it answered with %d bytes of %d", len(a.Data), len(r.Data))
	}
	return a.Data, err
}

// Reset ends the controller's association, and returns when the next one is in use.
func (c *Client) Reset(ctx context.Context) error {
	return c.Do(ctx, http.MethodPost, "/v1/reset", nil, nil)
}

// Reauthenticate has the server authenticate its connection again.
func (c *Client) Reauthenticate(ctx context.Context, r Reauthentication) error {
	return c.Do(ctx, http.MethodPost, "/v1/reauth", r, nil)
}

// Rescan has the server look at the namespaces.
func (c *Client) Rescan(ctx context.Context) error {
	return c.Do(ctx, http.MethodPost, "/v1/rescan", nil, nil)
}

// AddPath has the server add a path.
func (c *Client) AddPath(ctx context.Context, r PathRequest) error {
	return c.Do(ctx, http.MethodPost, "/v1/path/add", r, nil)
}

// RemovePath has the server remove a path, in the form of --path.
func (c *Client) RemovePath(ctx context.Context, path string) error {
	return c.Do(ctx, http.MethodPost, "/v1/path/remove", PathRequest{Path: path}, nil)
}

// SetPolicy changes how a request chooses its path.
func (c *Client) SetPolicy(ctx context.Context, r PolicyRequest) error {
	return c.Do(ctx, http.MethodPost, "/v1/policy", r, nil)
}

// Do sends body, if any, as JSON and reads the answer into result, if that is not
// nil. The error is an *exit.Error if the server refused.
func (c *Client) Do(ctx context.Context, method, path string, body, result any) error {
	var text []byte
	if body != nil {
		var err error
		if text, err = json.Marshal(body); err != nil {
			return fmt.Errorf("%s %s: %w", method, path, err)
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://server"+path, bytes.NewReader(text))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	resp, err := c.http.Do(req)
	if u := (*url.Error)(nil); errors.As(err, &u) {
		err = u.Err // the URL says nothing
	}
	if Gone(err) {
		return fmt.Errorf("the server does not run any more, or not yet: %w", err)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("the server did not answer in time: %w", err)
	}
	if err != nil {
		return fmt.Errorf("ask server: %w", err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return fmt.Errorf("ask server: %w", err)
	}
	if len(answer) > maxAnswer {
		return fmt.Errorf("ask server: its answer is longer than %d bytes", maxAnswer)
	}
	if resp.StatusCode == http.StatusNotFound {
		return fmt.Errorf("ask server: it runs another build of this program, which does not know %s", path)
	}
	if resp.StatusCode != http.StatusOK {
		var e exit.Error
		if err := json.Unmarshal(answer, &e); err != nil || e.Code == exit.OK {
			return fmt.Errorf("ask server: %s", resp.Status)
		}
		return &e
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(answer, result); err != nil {
		return fmt.Errorf("ask server: %w", err)
	}
	return nil
}
