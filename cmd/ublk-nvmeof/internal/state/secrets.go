package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
)

// secretsFile is beside the state, and only its owner can read it.
const secretsFile = "secrets.json"

// Secrets are the keys of a server's connection in their text form. Empty ones are not
// there.
type Secrets struct {
	Host       string `json:"dhchap_secret,omitempty"`
	Controller string `json:"dhchap_ctrl_secret,omitempty"`
}

// Secrets reads the keys with which the server of the record connected, for its successor.
func (r Record) Secrets() (s Secrets, err error) {
	file := filepath.Join(r.dir, secretsFile)
	text, err := readFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return s, nil
	case err == nil:
		err = json.Unmarshal(text, &s)
	}
	if err != nil {
		err = fmt.Errorf("read %s: %w", file, err)
	}
	return s, err
}

// SaveSecrets replaces the keys atomically.
func (e *Entry) SaveSecrets(s Secrets) error {
	home, err := e.open()
	if err != nil {
		return err
	}
	if s != (Secrets{}) {
		return writeIn(home, secretsFile, s, 0o600)
	}
	if err := home.Remove(secretsFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove keys: %w", err)
	}
	return nil
}

// connectionsFile has the traces of the connections to the target (rdma.Traced). Only the owner can
// read it, because a trace is enough to end a connection.
const connectionsFile = "connections.json"

// Connections reads the traces of the connections that the server of the record had.
func (r Record) Connections() (traces []string, err error) {
	file := filepath.Join(r.dir, connectionsFile)
	text, err := readFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err == nil:
		err = json.Unmarshal(text, &traces)
	}
	if err != nil {
		err = fmt.Errorf("read %s: %w", file, err)
	}
	return traces, err
}

// SaveConnections replaces the traces atomically.
func (e *Entry) SaveConnections(traces []string) error {
	home, err := e.open()
	if err != nil {
		return err
	}
	return writeIn(home, connectionsFile, traces, 0o600)
}
