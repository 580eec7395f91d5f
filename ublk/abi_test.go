package ublk

import (
	"errors"
	"io/fs"
	"math"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
)

// TestOpcodes compares the computed opcodes with what a C program printed that
// was compiled with ublk_cmd.h.
func TestOpcodes(t *testing.T) {
	for cmd, want := range map[command]uint32{
		addDev: 0xc0207504, setParams: 0xc0207508, startDev: 0xc0207506, stopDev: 0xc0207507, delDev: 0xc0207505,
		getDevInfo: 0x80207502, getQueueAffinity: 0x80207501, getFeatures: 0x80207513, updateSize: 0xc0207515, quiesceDev: 0xc0207516, tryStopDev: 0xc0207517,
		fetchReq: 0xc0107520, commitAndFetchReq: 0xc0107521,
	} {
		if uint32(cmd) != want || cmd.String() == "" {
			t.Errorf("%v is %#x, want %#x", cmd, uint32(cmd), want)
		}
	}
}

func TestFeatureNames(t *testing.T) {
	if got := (SafeStop | UserRecovery | 1<<40).String(); got != "USER_RECOVERY SAFE_STOP_DEV bit 40" {
		t.Error(got)
	}
	if len(featureNames) != 21 || featureNames[19] != "SHMEM_ZC" || featureNames[12] != "QUIESCE" {
		t.Error("names and bits do not match")
	}
}

func TestParams(t *testing.T) {
	g := block.Geometry{
		Sectors: 1 << 40, LogicalBlock: 4096, PhysicalBlock: 8192, IOMin: 16384, IOOpt: 3 << 17, ChunkSectors: 777,
		VolatileCache: true, ReadOnly: true, MaxDiscardSectors: 1 << 22, DiscardAlignment: 4096, MaxZeroesSectors: 128,
	}
	want := params{
		len: 64, types: paramTypeBasic | paramTypeDiscard,
		basic: paramBasic{
			attrs: attrReadOnly | attrVolatileCache | attrFUA, logicalBlockShift: 12, physicalBlockShift: 13,
			ioMinShift: 14, ioOptShift: 18, maxSectors: 256, chunkSectors: 777, devSectors: 1 << 40,
		},
		discard: paramDiscard{alignment: 4096, granularity: 4096, maxSectors: 1 << 22, maxZeroesSectors: 128, maxSegments: 1},
	}
	if got := paramsOf(g, 128<<10); got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}

	plain := paramsOf(block.Geometry{Sectors: 8, LogicalBlock: 512, PhysicalBlock: 512}, 4096)
	if plain.types != paramTypeBasic || plain.basic.attrs != 0 || plain.discard != (paramDiscard{}) || plain.basic.ioMinShift != 9 {
		t.Errorf("plain device: %+v", plain)
	}
	zeroes := paramsOf(block.Geometry{LogicalBlock: 512, PhysicalBlock: 512, MaxZeroesSectors: 1}, 4096)
	if d := zeroes.discard; d.maxSectors != 0 || d.maxSegments != 0 || d.granularity != 512 {
		t.Errorf("write zeroes alone: %+v", d)
	}
	huge := paramsOf(block.Geometry{LogicalBlock: 512, PhysicalBlock: 1 << 31, IOOpt: math.MaxUint32}, 4096)
	if huge.basic.physicalBlockShift != maxShift || huge.basic.ioOptShift != maxShift {
		t.Errorf("sizes beyond what the driver takes: %+v", huge.basic)
	}
}

func TestFirstCPU(t *testing.T) {
	mask := make([]byte, 128)
	var allowed unix.CPUSet
	check := func(want int) {
		t.Helper()
		if got := firstCPU(mask, &allowed); got != want {
			t.Errorf("CPU %d, want %d", got, want)
		}
	}
	check(-1)
	mask[0], mask[9] = 0x18, 0x40 // CPUs 3, 4, 78
	check(-1)
	allowed.Set(78)
	check(78)
	allowed.Set(4)
	check(4)
	allowed.Clear(4)
	allowed.Set(5)
	check(78)
}

func TestOpenError(t *testing.T) {
	for _, c := range []struct{ from, to error }{
		{unix.ENOENT, ErrNoDriver}, {unix.ENODEV, ErrNoDriver}, {unix.ENXIO, ErrNoDriver},
		{unix.EACCES, ErrPermission}, {unix.EPERM, ErrPermission}, {unix.EMFILE, unix.EMFILE},
	} {
		err := openError("/dev/x", c.from)
		if !errors.Is(err, c.to) || !errors.Is(err, c.from) {
			t.Errorf("%v became %v", c.from, err)
		}
		if errors.Is(c.to, unix.EMFILE) && (errors.Is(err, ErrNoDriver) || errors.Is(err, ErrPermission)) {
			t.Errorf("%v became %v", c.from, err)
		}
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []struct {
		cfg  Config
		want string
	}{
		{Config{}, "no block device"},
		{Config{ID: -2}, "device number -2"},
		{Config{ID: 1 << 20}, "device number 1048576"},
		{Config{Depth: 4097}, "no block device"},
	} {
		if _, err := Start(t.Context(), c.cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c.cfg, err)
		}
	}
}

// TestNoDriver needs a host without the driver.
func TestNoDriver(t *testing.T) {
	loadModule()
	if err := unix.Access(controlPath, 0); !errors.Is(err, fs.ErrNotExist) {
		t.Skip("the driver is loaded")
	}
	if err := Available(); !errors.Is(err, ErrNoDriver) {
		t.Errorf("available: %v", err)
	}
	if _, err := GetFeatures(t.Context()); !errors.Is(err, ErrNoDriver) {
		t.Errorf("features: %v", err)
	}
}

// A back end of another block size cannot be what users of a device were told, one with
// other limits can.
func TestMismatch(t *testing.T) {
	g := block.Geometry{Sectors: 2048, LogicalBlock: 512, PhysicalBlock: 512, MaxIO: 1 << 20, MaxDiscardSectors: 8}
	told := paramsOf(g, 256<<10).basic
	for name, tt := range map[string]struct {
		change func(*block.Geometry)
		want   string // of the error
	}{
		"the same":         {func(*block.Geometry) {}, ""},
		"another size":     {func(h *block.Geometry) { h.Sectors = 4096 }, ""},
		"write protected":  {func(h *block.Geometry) { h.ReadOnly = true }, ""},
		"no discard":       {func(h *block.Geometry) { h.MaxDiscardSectors = 0 }, ""},
		"a cache":          {func(h *block.Geometry) { h.VolatileCache = true }, ""},
		"smaller requests": {func(h *block.Geometry) { h.MaxIO = 65536 }, ""},
		"block size":       {func(h *block.Geometry) { h.LogicalBlock, h.PhysicalBlock = 4096, 4096 }, "block size is 4096, the device has 512"},
	} {
		now := g
		tt.change(&now)
		err := mismatch(&told, now)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}
