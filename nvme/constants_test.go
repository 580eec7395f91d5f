package nvme

import "testing"

// The numbers are entered a second time here, as the specifications list them.
func TestConstants(t *testing.T) {
	for _, tt := range []struct {
		name string
		got  []uint64
		want []uint64
	}{
		{"i/o opcodes", nums(OpFlush, OpWrite, OpRead, OpWriteUncorrectable, OpCompare, OpWriteZeroes, OpDSM, OpVerify,
			OpReservationRegister, OpReservationReport, OpReservationAcquire, OpReservationRelease, OpCopy,
			OpZoneManagementSend, OpZoneManagementRecv, OpZoneAppend, OpFabrics),
			nums(0x00, 0x01, 0x02, 0x04, 0x05, 0x08, 0x09, 0x0C, 0x0D, 0x0E, 0x11, 0x15, 0x19, 0x79, 0x7A, 0x7D, 0x7F)},
		{"admin opcodes", nums(AdminGetLogPage, AdminIdentify, AdminAbort, AdminSetFeatures, AdminGetFeatures, AdminAsyncEvent,
			AdminNamespaceManagement, AdminNamespaceAttachment, AdminKeepAlive, AdminFormatNVM, AdminSanitize),
			nums(0x02, 0x06, 0x08, 0x09, 0x0A, 0x0C, 0x0D, 0x15, 0x18, 0x80, 0x84)},
		{"fabrics commands", nums(FabricsPropertySet, FabricsConnect, FabricsPropertyGet, FabricsAuthSend, FabricsAuthReceive,
			FabricsDisconnect), nums(0x00, 0x01, 0x04, 0x05, 0x06, 0x08)},
		{"properties", nums[int](PropCAP, PropVS, PropCC, PropCSTS, PropNSSR, PropCRTO), nums(0x00, 0x08, 0x14, 0x1C, 0x20, 0x68)},
		{"reset", nums[int64](NSSRReset), []uint64{'N'<<24 | 'V'<<16 | 'M'<<8 | 'e'}},
		{"cns", nums[int](CNSNamespace, CNSController, CNSActiveNSList, CNSNamespaceDescriptors, CNSNamespaceCSI, CNSControllerCSI,
			CNSActiveNSListCSI, CNSNSIndependent, CNSCommandSets), nums(0, 1, 2, 3, 5, 6, 7, 8, 0x1C)},
		{"features", nums[int](FeatureArbitration, FeaturePowerManagement, FeatureTemperature, FeatureErrorRecovery,
			FeatureVolatileWriteCache, FeatureNumberOfQueues, FeatureWriteAtomicity, FeatureAsyncEvent, FeatureTimestamp,
			FeatureKeepAlive, FeatureHostBehavior, FeatureCommandSetProfile, FeatureSoftwareProgress, FeatureHostID,
			FeatureReservationMask, FeatureReservationPersist, FeatureWriteProtect),
			nums(1, 2, 4, 5, 6, 7, 0x0A, 0x0B, 0x0E, 0x0F, 0x16, 0x19, 0x80, 0x81, 0x82, 0x83, 0x84)},
		{"logs", nums[int](LogError, LogSMART, LogFirmwareSlot, LogChangedNamespaces, LogCommandEffects, LogANA, LogDiscovery,
			LogReservation), nums(1, 2, 3, 4, 5, 0x0C, 0x70, 0x80)},
		{"oacs bits", nums[int](OACSSecurity, OACSFormat, OACSFirmware, OACSNamespaceManagement, OACSSelfTest, OACSDirectives),
			nums(1, 2, 4, 8, 0x10, 0x20)},
		{"oncs bits", nums[int](ONCSCompare, ONCSWriteUncorrectable, ONCSDSM, ONCSWriteZeroes, ONCSSaveFeatures, ONCSReservations,
			ONCSTimestamp, ONCSVerify, ONCSCopy), nums(1, 2, 4, 8, 0x10, 0x20, 0x40, 0x80, 0x100)},
		{"cmic bits", nums[int](CMICMultiPort, CMICMultiController, CMICSRIOV, CMICANA), nums(1, 2, 4, 8)},
		{"ctratt bits", nums[int](CTRATTHostID128, CTRATTTBKAS, CTRATTELBAS, CTRATTMEM, CTRATTFDP),
			nums(1, 0x40, 0x8000, 0x10000, 0x80000)},
		{"lpa bits", nums[int](LPASMARTPerNamespace, LPACommandEffects, LPAExtended), nums(1, 2, 4)},
		{"anacap bits", nums[int](ANACAPOptimized, ANACAPNonOptimized, ANACAPInaccessible, ANACAPPersistentLoss, ANACAPChange,
			ANACAPFixedGroup, ANACAPGroupID), nums(1, 2, 4, 8, 0x10, 0x40, 0x80)},
		{"vwc bits", nums[int](VWCPresent, VWCFlushAllMask), nums(1, 6)},
		{"sgls bits", nums[int](SGLSSupportMask, SGLSKeyed, SGLSOffset), nums(3, 4, 0x100000)},
		{"nsfeat bits", nums[int](NSFEATThin, NSFEATAtomic, NSFEATDULBE, NSFEATUIDKept), nums(1, 2, 4, 8)},
		{"independent nsfeat bits", nums[int](NSIndependentRotational, NSIndependentNoVWC), nums(0x10, 0x20)},
		{"aen bits", nums[int64](AENNamespaceAttribute, AENFirmwareActivation, AENTelemetry, AENANAChange, AENPredictableLatency,
			AENLBAStatus, AENEnduranceGroup, AENDiscoveryChange),
			nums[int64](0x100, 0x200, 0x400, 0x800, 0x1000, 0x2000, 0x4000, 0x80000000)},
		{"connect attributes", nums[int](ConnectPriorityMask, ConnectDisableSQFlow, ConnectDeletesQueue), nums(3, 4, 8)},
		{"controller ids", nums[int](CNTLIDDynamic, CNTLIDStatic, CNTLIDMax), nums(0xFFFF, 0xFFFE, 0xFFEF)},
		{"controller types", nums[int](ControllerTypeIO, ControllerTypeDiscovery, ControllerTypeAdmin), nums(1, 2, 3)},
		{"shutdown", nums[int](ShutdownNone, ShutdownNormal, ShutdownAbrupt, ShutdownStatusNormal, ShutdownStatusRunning,
			ShutdownStatusComplete), nums(0, 1, 2, 0, 1, 2)},
		{"warnings", nums[int](WarningSpare, WarningTemperature, WarningReliability, WarningReadOnly, WarningBackup, WarningPMR),
			nums(1, 2, 4, 8, 0x10, 0x20)},
	} {
		if len(tt.got) != len(tt.want) {
			t.Fatalf("%s: %d names, %d numbers", tt.name, len(tt.got), len(tt.want))
		}
		for i := range tt.got {
			if tt.got[i] != tt.want[i] {
				t.Errorf("%s, number %d: %#x, want %#x", tt.name, i+1, tt.got[i], tt.want[i])
			}
		}
	}
}

func nums[T ~uint8 | ~int | ~int64](v ...T) []uint64 {
	out := make([]uint64, len(v))
	for i := range v {
		out[i] = uint64(v[i])
	}
	return out
}
