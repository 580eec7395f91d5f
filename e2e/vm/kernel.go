package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// allSeries lists the kernels that can be named, and the Debian suites that carry
// them; label tells the archive of a suite as Debian's Release files do.
var allSeries = []series{
	{"6.1", []suite{{"Debian", "bookworm"}, {"Debian-Security", "bookworm-security"}}},
	{"6.12", []suite{{"Debian-Security", "bookworm-security"}}},
	{"7.3", []suite{{"Debian", "trixie-backports"}}},
}

type series struct {
	name   string
	suites []suite
}

type suite struct{ label, name string }

func seriesNames() string {
	var names []string
	for _, s := range allSeries {
		names = append(names, s.name)
	}
	return strings.Join(names, ", ")
}

// bootModules are what the guest needs before it sees its root file system;
// their dependencies come along, and what is built in is left out.
var bootModules = []string{
	"virtio_pci", "virtio_console", "9p", "9pnet_virtio", "overlay", "virtio_net", "configfs",
}

// kernel is an unpacked kernel in the cache.
type kernel struct {
	release string   // as uname -r
	image   string   // path of the bzImage
	modules string   // path of the lib/modules/RELEASE tree
	boot    []string // paths of the bootModules, uncompressed, in load order
}

// openKernel returns the kernel of a series, after fetching it if the cache has
// none. Two processes may call it at once.
func openKernel(cache, name string) (kernel, error) {
	i := slices.IndexFunc(allSeries, func(s series) bool { return s.name == name })
	if i < 0 {
		return kernel{}, fmt.Errorf("--kernel %q: want one of %s", name, seriesNames())
	}
	dir := filepath.Join(cache, "kernels", name)
	k, err := loadKernel(dir)
	if !errors.Is(err, os.ErrNotExist) {
		return k, err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return kernel{}, err
	}
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return kernel{}, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return kernel{}, fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	if k, err := loadKernel(dir); !errors.Is(err, os.ErrNotExist) {
		return k, err
	}
	fmt.Fprintf(os.Stderr, "vm: fetching kernel %s\n", name)
	tmp := dir + ".new"
	if err := errors.Join(os.RemoveAll(tmp), os.MkdirAll(tmp, 0o755)); err != nil {
		return kernel{}, err
	}
	if err := fetchKernel(tmp, name, allSeries[i].suites); err != nil {
		return kernel{}, fmt.Errorf("fetch kernel %s: %w", name, err)
	}
	if err := os.Rename(tmp, dir); err != nil {
		return kernel{}, err
	}
	return loadKernel(dir)
}

// loadKernel reads the layout that fetchKernel leaves behind: release, vmlinuz,
// lib/modules/RELEASE, boot/NN-name.ko.
func loadKernel(dir string) (kernel, error) {
	release, err := os.ReadFile(filepath.Join(dir, "release"))
	if err != nil {
		return kernel{}, err
	}
	k := kernel{release: string(release), image: filepath.Join(dir, "vmlinuz")}
	k.modules = filepath.Join(dir, "lib", "modules", k.release)
	k.boot, err = filepath.Glob(filepath.Join(dir, "boot", "*.ko"))
	return k, err
}

// fetchKernel downloads the newest kernel of a series and lays it out in dir.
func fetchKernel(dir, name string, suites []suite) error {
	apt, err := newApt(filepath.Join(dir, "apt"), suites)
	if err != nil {
		return err
	}
	names, err := apt.output("apt-cache", "pkgnames", "linux-image-"+name+".")
	if err != nil {
		return err
	}
	release, err := apt.newest(regexp.MustCompile(
		`^linux-image-(`+regexp.QuoteMeta(name)+`\.\d+(?:\+deb\d+|-\d+)?-amd64)$`), strings.Fields(names))
	if err != nil {
		return err
	}
	// Debian 13 splits what Debian 12 ships as one package.
	debs, err := apt.download(release, "linux-image-", "linux-base-", "linux-binary-", "linux-modules-")
	if err != nil {
		return err
	}
	tree := filepath.Join(dir, "tree")
	for _, deb := range debs {
		if _, err := output("", "dpkg-deb", "-x", deb, tree); err != nil {
			return err
		}
	}
	mods, err := firstOf(filepath.Join(tree, "lib/modules", release), filepath.Join(tree, "usr/lib/modules", release))
	if err != nil {
		return err
	}
	image, err := firstOf(filepath.Join(tree, "boot/vmlinuz-"+release), filepath.Join(mods, "vmlinuz"))
	if err != nil {
		return err
	}
	err = errors.Join(
		os.Rename(image, filepath.Join(dir, "vmlinuz")),
		os.MkdirAll(filepath.Join(dir, "lib/modules"), 0o755),
		os.Rename(mods, filepath.Join(dir, "lib/modules", release)),
		os.RemoveAll(tree), os.RemoveAll(apt.dir))
	if err != nil {
		return err
	}
	if _, err := output("", "depmod", "-b", dir, release); err != nil {
		return err
	}
	if err := unpackModules(filepath.Join(dir, "lib/modules", release), filepath.Join(dir, "boot"), bootModules); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "release"), []byte(release), 0o644)
}

// unpackModules writes modules of a lib/modules/RELEASE tree and what they depend on to
// dir, uncompressed and numbered in load order.
func unpackModules(mods, dir string, want []string) error {
	dep, err := os.ReadFile(filepath.Join(mods, "modules.dep"))
	if err != nil {
		return err
	}
	builtin, err := os.ReadFile(filepath.Join(mods, "modules.builtin"))
	if err != nil {
		return err
	}
	order, err := loadOrder(string(dep), string(builtin), want)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for i, path := range order {
		data, err := decompress(filepath.Join(mods, path))
		if err != nil {
			return err
		}
		file := fmt.Sprintf("%02d-%s.ko", i, moduleName(path))
		if err := os.WriteFile(filepath.Join(dir, file), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// loadOrder returns the files to load for the wanted modules, dependencies
// first. dep and builtin are the texts of modules.dep and modules.builtin.
func loadOrder(dep, builtin string, want []string) ([]string, error) {
	deps := map[string][]string{} // module name → its file, then those it needs, nearest first
	for line := range strings.Lines(dep) {
		file, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		if ok {
			deps[moduleName(file)] = append([]string{file}, strings.Fields(rest)...)
		}
	}
	built := map[string]bool{}
	for line := range strings.Lines(builtin) {
		built[moduleName(strings.TrimSpace(line))] = true
	}
	var order []string
	for _, name := range want {
		files, ok := deps[name]
		if !ok {
			if built[name] {
				continue
			}
			return nil, fmt.Errorf("module %s: neither in modules.dep nor built in", name)
		}
		for _, file := range slices.Backward(files) {
			if !slices.Contains(order, file) {
				order = append(order, file)
			}
		}
	}
	return order, nil
}

// moduleName is the name of a module's file without path and suffixes.
func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

func decompress(path string) ([]byte, error) {
	var tool string
	switch filepath.Ext(path) {
	case ".ko":
		return os.ReadFile(path)
	case ".xz":
		tool = "xz"
	case ".zst":
		tool = "zstd"
	default:
		return nil, fmt.Errorf("decompress %s: unknown suffix", path)
	}
	text, err := output("", tool, "-dcq", path)
	return []byte(text), err
}

// apt runs apt with sources, lists and cache of its own, so that the host's
// stay as they are. Only the mirrors are taken over.
type apt struct {
	dir     string
	options []string
}

func newApt(dir string, suites []suite) (*apt, error) {
	mirrors, err := output("", "apt-get", "indextargets",
		"--format", "$(ORIGIN) $(LABEL) $(REPO_URI)", "Created-By: Packages")
	if err != nil {
		return nil, err
	}
	sources, err := sourcesList(mirrors, suites)
	if err != nil {
		return nil, err
	}
	for _, d := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	list := filepath.Join(dir, "sources.list")
	if err := os.WriteFile(list, []byte(sources), 0o644); err != nil {
		return nil, err
	}
	a := &apt{dir: dir, options: []string{
		"-o", "Dir::Etc::sourcelist=" + list,
		"-o", "Dir::Etc::sourceparts=/dev/null",
		"-o", "Dir::State::lists=" + filepath.Join(dir, "lists"),
		"-o", "Dir::Cache=" + filepath.Join(dir, "cache"),
		"-o", "APT::Sandbox::User=root",
		"-o", "Acquire::Retries=3",
		"-q",
	}}
	_, err = a.output("apt-get", "update", "--error-on=any")
	return a, err
}

// archiveKeyring is installed by the package debian-archive-keyring.
const archiveKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// sourcesList is a sources.list(5) of the suites on the host's own mirrors,
// given as lines of "origin label uri".
func sourcesList(mirrors string, suites []suite) (string, error) {
	uris := map[string]string{}
	for line := range strings.Lines(mirrors) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "Debian" && uris[f[1]] == "" {
			uris[f[1]] = f[2]
		}
	}
	var b strings.Builder
	for _, s := range suites {
		uri, ok := uris[s.label]
		if !ok {
			return "", fmt.Errorf("apt has no source labelled %s on this host; is it listed, and did apt-get update run?", s.label)
		}
		fmt.Fprintf(&b, "deb [signed-by=%s arch=amd64 lang=none target=Packages] %s %s main\n", archiveKeyring, uri, s.name)
	}
	return b.String(), nil
}

func (a *apt) output(name string, args ...string) (string, error) {
	return output(a.dir, name, slices.Concat(args[:1], a.options, args[1:])...)
}

// newest returns what pattern captures in the package with the highest version.
func (a *apt) newest(pattern *regexp.Regexp, names []string) (string, error) {
	var best, bestVersion string
	for _, name := range names {
		m := pattern.FindStringSubmatch(name)
		if m == nil {
			continue
		}
		// The first record is apt's candidate.
		record, err := a.output("apt-cache", "show", "--no-all-versions", name)
		if err != nil {
			return "", err
		}
		v := regexp.MustCompile(`(?m)^Version: (.*)$`).FindStringSubmatch(record)
		if v == nil {
			return "", fmt.Errorf("package %s: no version in its record", name)
		}
		if best == "" || exec.Command("dpkg", "--compare-versions", v[1], "gt", bestVersion).Run() == nil {
			best, bestVersion = m[1], v[1]
		}
	}
	if best == "" {
		return "", fmt.Errorf("no package matches %v in the suites known to carry it", pattern)
	}
	return best, nil
}

// download fetches those of the packages PREFIX+release that exist, and returns
// the paths of the files.
func (a *apt) download(release string, prefixes ...string) ([]string, error) {
	args := []string{"download"}
	for _, p := range prefixes {
		names, err := a.output("apt-cache", "pkgnames", p+release)
		if err != nil {
			return nil, err
		}
		if slices.Contains(strings.Fields(names), p+release) {
			args = append(args, p+release)
		}
	}
	if _, err := a.output("apt-get", args...); err != nil {
		return nil, err
	}
	return filepath.Glob(filepath.Join(a.dir, "*.deb"))
}

func firstOf(paths ...string) (string, error) {
	for _, p := range paths {
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("none of %s: %w", strings.Join(paths, ", "), os.ErrInvalid)
}

// output runs a command in dir and returns its standard output; its error
// carries what it wrote to standard error.
func output(dir, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("run %s %s: %w\n%s", name, args[0], err, bytes.TrimSpace(stderr.Bytes()))
	}
	return string(out), nil
}
