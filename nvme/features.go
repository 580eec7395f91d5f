package nvme

// Feature identifiers of Set and Get Features
const (
	FeatureArbitration        = 0x01
	FeaturePowerManagement    = 0x02
	FeatureTemperature        = 0x04
	FeatureErrorRecovery      = 0x05
	FeatureVolatileWriteCache = 0x06 // bit 0: the cache is on
	FeatureNumberOfQueues     = 0x07 // NumberOfQueues, GrantedQueues
	FeatureWriteAtomicity     = 0x0A
	FeatureAsyncEvent         = 0x0B // AEN bits
	FeatureTimestamp          = 0x0E
	FeatureKeepAlive          = 0x0F // milliseconds
	FeatureHostBehavior       = 0x16 // HostBehavior
	FeatureCommandSetProfile  = 0x19
	FeatureSoftwareProgress   = 0x80
	FeatureHostID             = 0x81
	FeatureReservationMask    = 0x82
	FeatureReservationPersist = 0x83
	FeatureWriteProtect       = 0x84
)

// MaxQueues is the largest number of I/O queues that a controller can grant.
const MaxQueues = 0xFFFF

// NumberOfQueues encodes n (1..65535) I/O submission queues and n completion queues for
// FeatureNumberOfQueues, as CDW11 of the request or as the result. It panics if n is
// outside this range. The 0-based value 0xFFFF is reserved, which limits a request to
// 65534. No host requests as many.
func NumberOfQueues(n int) uint32 {
	if n < 1 || n > MaxQueues {
		panic("nvme: number of queues outside 1..65535")
	}
	return uint32(n-1) | uint32(n-1)<<16
}

// GrantedQueues decodes the result of FeatureNumberOfQueues. It returns the number of I/O
// queues with a submission and a completion side, 1..65536. Controllers may grant fewer
// or more queues than requested.
func GrantedQueues(result uint32) int {
	return int(min(result&0xFFFF, result>>16)) + 1
}

// HostBehavior is the data of FeatureHostBehavior (Base, "Host Behavior
// Support").
type HostBehavior [512]byte

// ACRE reports whether the host understands command retry delays.
func (h *HostBehavior) ACRE() bool { return h[0] == 1 }

// SetACRE sets whether the host understands command retry delays. If it does not, a
// controller must not return CRD in a [Status].
func (h *HostBehavior) SetACRE(on bool) { h[0] = b2u8(on) }

// LBAFEE reports whether the host understands extended LBA formats.
func (h *HostBehavior) LBAFEE() bool { return h[2] == 1 }

// SetLBAFEE sets whether the host understands extended LBA formats.
func (h *HostBehavior) SetLBAFEE(on bool) { h[2] = b2u8(on) }

func b2u8(on bool) uint8 {
	if on {
		return 1
	}
	return 0
}
