package ublk

import (
	"fmt"
	"math/bits"
	"strings"
)

// Features are UBLK_F_* flags: those that the driver supports (GetFeatures), or those that
// it granted to a device (Info.Features).
type Features uint64

// Feature flags, with the first kernel that has them
const (
	ZeroCopy        Features = 1 << 0  // SUPPORT_ZERO_COPY, 6.15
	UserRecovery    Features = 1 << 3  // USER_RECOVERY, 6.1
	RecoveryReissue Features = 1 << 4  // USER_RECOVERY_REISSUE, 6.1
	Unprivileged    Features = 1 << 5  // UNPRIVILEGED_DEV, 6.3
	IoctlEncode     Features = 1 << 6  // CMD_IOCTL_ENCODE, 6.4
	UserCopy        Features = 1 << 7  // USER_COPY, 6.5
	Zoned           Features = 1 << 8  // ZONED, 6.6
	RecoveryFailIO  Features = 1 << 9  // USER_RECOVERY_FAIL_IO, 6.13
	UpdateSize      Features = 1 << 10 // UPDATE_SIZE, 6.16
	Quiesce         Features = 1 << 12 // QUIESCE, 6.16
	SafeStop        Features = 1 << 17 // SAFE_STOP_DEV, 7.0
	ShmemZeroCopy   Features = 1 << 19 // SHMEM_ZC, 7.1
)

// featureNames are the names of the bits in ublk_cmd.h.
var featureNames = [...]string{
	"SUPPORT_ZERO_COPY", "URING_CMD_COMP_IN_TASK", "NEED_GET_DATA", "USER_RECOVERY", "USER_RECOVERY_REISSUE",
	"UNPRIVILEGED_DEV", "CMD_IOCTL_ENCODE", "USER_COPY", "ZONED", "USER_RECOVERY_FAIL_IO", "UPDATE_SIZE",
	"AUTO_BUF_REG", "QUIESCE", "PER_IO_DAEMON", "BUF_REG_OFF_DAEMON", "BATCH_IO", "INTEGRITY", "SAFE_STOP_DEV",
	"NO_AUTO_PART_SCAN", "SHMEM_ZC", "IO_DESC_SIZE",
}

// Has reports whether f has all flags of want.
func (f Features) Has(want Features) bool { return f&want == want }

// String returns the names of the flags, separated by spaces.
func (f Features) String() string {
	var names []string
	for rest := uint64(f); rest != 0; rest &= rest - 1 {
		bit := bits.TrailingZeros64(rest)
		if bit < len(featureNames) {
			names = append(names, featureNames[bit])
		} else {
			names = append(names, fmt.Sprintf("bit %d", bit))
		}
	}
	return strings.Join(names, " ")
}

// RecoveryPolicy is what the driver does with a device whose server dies.
type RecoveryPolicy uint8

// Recovery policies.
const (
	// RecoveryUnset means RecoveryNone.
	RecoveryUnset RecoveryPolicy = iota
	// RecoveryNone removes the device, and I/O fails.
	RecoveryNone
	// RecoveryRequeue keeps the device. I/O waits for the next server and is sent
	// to it again (USER_RECOVERY, USER_RECOVERY_REISSUE).
	RecoveryRequeue
	// RecoveryFail keeps the device. I/O fails until there is a new server
	// (USER_RECOVERY, USER_RECOVERY_FAIL_IO).
	RecoveryFail
)

// optional returns the flags that the policy uses if the driver has them.
func (p RecoveryPolicy) optional() Features {
	if p.features().Has(UserRecovery) {
		return UpdateSize | Quiesce // the driver refuses Quiesce without recovery
	}
	return UpdateSize
}

// features returns the flags that the policy needs.
func (p RecoveryPolicy) features() Features {
	switch p {
	case RecoveryRequeue:
		return UserRecovery | RecoveryReissue
	case RecoveryFail:
		return UserRecovery | RecoveryFailIO
	default:
		return 0
	}
}
