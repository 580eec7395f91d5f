package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

// Keys are handed over to another process in memory files that it inherits: every user can
// read the arguments of a process, and its environment stays readable as long as it runs.

// firstSecret is the descriptor of the first of these files in a process that is started in
// the background. The one before is for its report.
const firstSecret = 4

// memoryFiles returns files with these contents, which are closed by exec.
func memoryFiles(texts []string) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files, err = nil, fmt.Errorf("hand over keys: %w", err)
		}
	}()
	for _, text := range texts {
		fd, err := unix.MemfdCreate("key", unix.MFD_CLOEXEC)
		if err != nil {
			return files, os.NewSyscallError("memfd_create", err)
		}
		f := os.NewFile(uintptr(fd), "key")
		files = append(files, f)
		if err := errors.Join(f.Chmod(0o600), writeText(f, text)); err != nil {
			return files, err
		}
	}
	return files, nil
}

func writeText(f *os.File, text string) error {
	_, err := f.WriteString(text)
	return err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // a memory file
	}
}

// keys are the keys of a connection, which may be missing.
type keys struct{ host, controller *auth.Key }

func keysOf(o *options.Connect) keys { return keys{o.Secret, o.ControllerSecret} }

// keysFrom returns the keys of a recorded server.
func keysFrom(r state.Record) (k keys, err error) {
	s, err := r.Secrets()
	if err != nil {
		return k, err
	}
	for _, f := range []struct {
		text string
		key  **auth.Key
	}{{s.Host, &k.host}, {s.Controller, &k.controller}} {
		if f.text == "" {
			continue
		}
		if *f.key, err = auth.ParseKey(f.text); err != nil {
			return k, fmt.Errorf("recorded keys: %w", err)
		}
	}
	return k, nil
}

// texts are the keys that exist, and names their flags.
func (k keys) texts() (names, texts []string) {
	for _, f := range []struct {
		name string
		key  *auth.Key
	}{{options.HostSecret, k.host}, {options.ControllerSecret, k.controller}} {
		if f.key != nil {
			names, texts = append(names, f.name), append(texts, f.key.Text())
		}
	}
	return names, texts
}

// handOver returns the flags that give the keys to a process in the background, and the
// files that it must get as descriptors from firstSecret on.
func (k keys) handOver() (args []string, files []*os.File, err error) {
	names, texts := k.texts()
	for i, name := range names {
		args = append(args, "--"+name+"="+options.DescriptorSecret(firstSecret+i))
	}
	files, err = memoryFiles(texts)
	return args, files, err
}

// keep returns the flags that give the keys to the program that this process executes next,
// and the files, which must stay open until then.
func (k keys) keep() (args []string, files []*os.File, err error) {
	names, texts := k.texts()
	if files, err = memoryFiles(texts); err != nil {
		return nil, nil, err
	}
	for i, f := range files {
		if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFD, 0); err != nil {
			closeAll(files)
			return nil, nil, os.NewSyscallError("fcntl", err)
		}
		args = append(args, "--"+names[i]+"="+options.DescriptorSecret(int(f.Fd())))
	}
	return args, files, nil
}
