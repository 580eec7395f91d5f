package nvme

// Bits of [IdentifyNamespace.NSFEAT].
const (
	NSFEATThin    = 1 << 0
	NSFEATAtomic  = 1 << 1 // NAWUN, NAWUPF and NACWU are valid
	NSFEATDULBE   = 1 << 2 // reading deallocated blocks can be made an error
	NSFEATUIDKept = 1 << 3 // NGUID and EUI64 are never used again
)

// Contents of deallocated blocks when they are read, in bits 0-2 of
// [IdentifyNamespace.DLFEAT].
const (
	DLFEATUnknown = 0
	DLFEATZeroes  = 1
	DLFEATOnes    = 2

	dlfeatReadMask        = 7
	dlfeatWriteZeroesDEAC = 1 << 3
)

// Bits of [IdentifyNSIndependent.NSFEAT].
const (
	NSIndependentRotational = 1 << 4
	NSIndependentNoVWC      = 1 << 5
)

const (
	flbasLow      = 0x0F
	flbasExtended = 0x10
	flbasHigh     = 0x60

	nsattrWriteProtected = 1 << 0
	nstatReady           = 1 << 0 // NRDY
	nmicShared           = 1 << 0
)

// LBAFormat is a format of a namespace.
type LBAFormat struct {
	// MS is the size of the metadata of a block in bytes.
	MS uint16
	// LBADS is the size of a block, 2^n bytes; below 9 the format is not
	// available.
	LBADS uint8
	// RP is the relative performance, 0 best to 3 degraded.
	RP uint8
}

// MaxLBAFormats is the number of entries in the table of formats.
const MaxLBAFormats = 64

// IdentifyNamespace is Identify CNS 00h (NVM, "Identify Namespace Data
// Structure").
type IdentifyNamespace [IdentifySize]byte

// IdentifyNamespaceAt returns the first 4096 bytes of b, without a copy. It panics if b
// is shorter.
func IdentifyNamespaceAt(b []byte) *IdentifyNamespace {
	return (*IdentifyNamespace)(b[:IdentifySize:IdentifySize])
}

// FormatIndex returns the index of the format in use, 0..63: four bits of FLBAS, and two
// more if the namespace has more than 16 formats. A faulty controller may name a format
// that it does not have.
func (n *IdentifyNamespace) FormatIndex() int {
	i := int(n.FLBAS() & flbasLow)
	if int(n.NLBAF())+1+int(n.NULBAF()) > 16 {
		i |= int(n.FLBAS()&flbasHigh) >> 1
	}
	return i
}

// ExtendedLBA reports whether the metadata, if there are any, follow the data of each
// block in the same buffer.
func (n *IdentifyNamespace) ExtendedLBA() bool { return n.FLBAS()&flbasExtended != 0 }

// LBAFormat returns format i. It panics if i is outside 0..63.
func (n *IdentifyNamespace) LBAFormat(i int) LBAFormat {
	f := n.lbaf(i)
	return LBAFormat{MS: le.Uint16(f[0:2]), LBADS: f[2], RP: f[3] & 3}
}

// SetLBAFormat sets format i. It panics if i is outside 0..63.
func (n *IdentifyNamespace) SetLBAFormat(i int, f LBAFormat) {
	b := n.lbaf(i)
	le.PutUint16(b[0:2], f.MS)
	b[2], b[3] = f.LBADS, f.RP&3
}

func (n *IdentifyNamespace) lbaf(i int) []byte {
	if uint(i) >= MaxLBAFormats {
		panic("nvme: lba format outside 0..63")
	}
	return n[128+4*i : 132+4*i]
}

// Format returns the format in use.
func (n *IdentifyNamespace) Format() LBAFormat { return n.LBAFormat(n.FormatIndex()) }

// OPTPERF returns the set of valid preferred sizes: 0 none; 1 NPWG, NPWA, NPDG, NPDA and
// NOWS; 2 NPWG, NPWA and NOWS, and NPDGL and NPDAL of [IdentifyNamespaceNVM]; 3 all of
// them.
func (n *IdentifyNamespace) OPTPERF() uint8 { return n.NSFEAT() >> 4 & 3 }

// SetOPTPERF sets OPTPERF within NSFEAT.
func (n *IdentifyNamespace) SetOPTPERF(v uint8) { n.SetNSFEAT(n.NSFEAT()&^(3<<4) | v&3<<4) }

// DeallocatedRead returns the contents of deallocated blocks when they are read, as a
// DLFEAT constant.
func (n *IdentifyNamespace) DeallocatedRead() uint8 { return n.DLFEAT() & dlfeatReadMask }

// WriteZeroesDEAC reports whether Write Zeroes supports the deallocate bit.
func (n *IdentifyNamespace) WriteZeroesDEAC() bool { return n.DLFEAT()&dlfeatWriteZeroesDEAC != 0 }

// WriteProtected reports whether the namespace is write protected at present.
func (n *IdentifyNamespace) WriteProtected() bool { return n.NSATTR()&nsattrWriteProtected != 0 }

// Shared reports whether several controllers may have the namespace attached.
func (n *IdentifyNamespace) Shared() bool { return n.NMIC()&nmicShared != 0 }

// NSZE returns the size of the namespace, in blocks.
func (n *IdentifyNamespace) NSZE() uint64 { return le.Uint64(n[0:8]) }

// SetNSZE sets NSZE.
func (n *IdentifyNamespace) SetNSZE(v uint64) { le.PutUint64(n[0:8], v) }

// NCAP returns the capacity: the number of blocks that may be allocated. It is 0 if the
// namespace is not active.
func (n *IdentifyNamespace) NCAP() uint64 { return le.Uint64(n[8:16]) }

// SetNCAP sets NCAP.
func (n *IdentifyNamespace) SetNCAP(v uint64) { le.PutUint64(n[8:16], v) }

// NUSE returns the utilization, in blocks.
func (n *IdentifyNamespace) NUSE() uint64 { return le.Uint64(n[16:24]) }

// SetNUSE sets NUSE.
func (n *IdentifyNamespace) SetNUSE(v uint64) { le.PutUint64(n[16:24], v) }

// NSFEAT returns the NSFEAT bits: features of the namespace.
func (n *IdentifyNamespace) NSFEAT() uint8 { return n[24] }

// SetNSFEAT sets NSFEAT.
func (n *IdentifyNamespace) SetNSFEAT(v uint8) { n[24] = v }

// NLBAF returns the number of LBA formats, 0-based.
func (n *IdentifyNamespace) NLBAF() uint8 { return n[25] }

// SetNLBAF sets NLBAF.
func (n *IdentifyNamespace) SetNLBAF(v uint8) { n[25] = v }

// FLBAS returns the format in use. See [IdentifyNamespace.FormatIndex] and
// [IdentifyNamespace.ExtendedLBA].
func (n *IdentifyNamespace) FLBAS() uint8 { return n[26] }

// SetFLBAS sets FLBAS.
func (n *IdentifyNamespace) SetFLBAS(v uint8) { n[26] = v }

// MC returns the metadata capabilities: bit 0 extended LBA, 1 separate buffer.
func (n *IdentifyNamespace) MC() uint8 { return n[27] }

// SetMC sets MC.
func (n *IdentifyNamespace) SetMC(v uint8) { n[27] = v }

// DPC returns the protection information capabilities: bits 0-2 types 1-3, bit
// 3 first bytes, bit 4 last bytes.
func (n *IdentifyNamespace) DPC() uint8 { return n[28] }

// SetDPC sets DPC.
func (n *IdentifyNamespace) SetDPC(v uint8) { n[28] = v }

// DPS returns the protection information in use: bits 0-2 type (0 none), bit 3
// first bytes of the metadata.
func (n *IdentifyNamespace) DPS() uint8 { return n[29] }

// SetDPS sets DPS.
func (n *IdentifyNamespace) SetDPS(v uint8) { n[29] = v }

// NMIC returns the multipath capabilities: bit 0 shared between controllers.
func (n *IdentifyNamespace) NMIC() uint8 { return n[30] }

// SetNMIC sets NMIC.
func (n *IdentifyNamespace) SetNMIC(v uint8) { n[30] = v }

// RESCAP returns the reservation capabilities; 0 means none.
func (n *IdentifyNamespace) RESCAP() uint8 { return n[31] }

// SetRESCAP sets RESCAP.
func (n *IdentifyNamespace) SetRESCAP(v uint8) { n[31] = v }

// FPI returns the progress of a format: bit 7 supported, bits 0-6 percent left.
func (n *IdentifyNamespace) FPI() uint8 { return n[32] }

// SetFPI sets FPI.
func (n *IdentifyNamespace) SetFPI(v uint8) { n[32] = v }

// DLFEAT returns the contents of deallocated blocks when they are read (a DLFEAT constant
// in bits 0-2), and whether Write Zeroes may deallocate (bit 3).
func (n *IdentifyNamespace) DLFEAT() uint8 { return n[33] }

// SetDLFEAT sets DLFEAT.
func (n *IdentifyNamespace) SetDLFEAT(v uint8) { n[33] = v }

// NAWUN returns the atomic write unit, in blocks, 0-based; valid with
// NSFEATAtomic.
func (n *IdentifyNamespace) NAWUN() uint16 { return le.Uint16(n[34:36]) }

// SetNAWUN sets NAWUN.
func (n *IdentifyNamespace) SetNAWUN(v uint16) { le.PutUint16(n[34:36], v) }

// NAWUPF returns the atomic write unit across power fail, in blocks, 0-based;
// valid with NSFEATAtomic.
func (n *IdentifyNamespace) NAWUPF() uint16 { return le.Uint16(n[36:38]) }

// SetNAWUPF sets NAWUPF.
func (n *IdentifyNamespace) SetNAWUPF(v uint16) { le.PutUint16(n[36:38], v) }

// NACWU returns the atomic compare and write unit, in blocks, 0-based; valid
// with NSFEATAtomic.
func (n *IdentifyNamespace) NACWU() uint16 { return le.Uint16(n[38:40]) }

// SetNACWU sets NACWU.
func (n *IdentifyNamespace) SetNACWU(v uint16) { le.PutUint16(n[38:40], v) }

// NABSN returns the atomic boundary, in blocks, 0-based; 0 means none.
func (n *IdentifyNamespace) NABSN() uint16 { return le.Uint16(n[40:42]) }

// SetNABSN sets NABSN.
func (n *IdentifyNamespace) SetNABSN(v uint16) { le.PutUint16(n[40:42], v) }

// NABO returns the offset of the first atomic boundary, in blocks.
func (n *IdentifyNamespace) NABO() uint16 { return le.Uint16(n[42:44]) }

// SetNABO sets NABO.
func (n *IdentifyNamespace) SetNABO(v uint16) { le.PutUint16(n[42:44], v) }

// NABSPF returns the atomic boundary across power fail, in blocks, 0-based; 0 means none.
func (n *IdentifyNamespace) NABSPF() uint16 { return le.Uint16(n[44:46]) }

// SetNABSPF sets NABSPF.
func (n *IdentifyNamespace) SetNABSPF(v uint16) { le.PutUint16(n[44:46], v) }

// NOIOB returns the boundary that commands should not cross, in blocks; 0 means none.
func (n *IdentifyNamespace) NOIOB() uint16 { return le.Uint16(n[46:48]) }

// SetNOIOB sets NOIOB.
func (n *IdentifyNamespace) SetNOIOB(v uint16) { le.PutUint16(n[46:48], v) }

// NPWG returns the preferred write granularity, in blocks, 0-based; valid if
// OPTPERF is not 0.
func (n *IdentifyNamespace) NPWG() uint16 { return le.Uint16(n[64:66]) }

// SetNPWG sets NPWG.
func (n *IdentifyNamespace) SetNPWG(v uint16) { le.PutUint16(n[64:66], v) }

// NPWA returns the preferred write alignment, in blocks, 0-based; valid if
// OPTPERF is not 0.
func (n *IdentifyNamespace) NPWA() uint16 { return le.Uint16(n[66:68]) }

// SetNPWA sets NPWA.
func (n *IdentifyNamespace) SetNPWA(v uint16) { le.PutUint16(n[66:68], v) }

// NPDG returns the preferred deallocate granularity, in blocks, 0-based; valid
// if OPTPERF is 1 or 3.
func (n *IdentifyNamespace) NPDG() uint16 { return le.Uint16(n[68:70]) }

// SetNPDG sets NPDG.
func (n *IdentifyNamespace) SetNPDG(v uint16) { le.PutUint16(n[68:70], v) }

// NPDA returns the preferred deallocate alignment, in blocks, 0-based; valid if
// OPTPERF is 1 or 3.
func (n *IdentifyNamespace) NPDA() uint16 { return le.Uint16(n[70:72]) }

// SetNPDA sets NPDA.
func (n *IdentifyNamespace) SetNPDA(v uint16) { le.PutUint16(n[70:72], v) }

// NOWS returns the optimal write size, in blocks, 0-based; valid if OPTPERF is
// not 0.
func (n *IdentifyNamespace) NOWS() uint16 { return le.Uint16(n[72:74]) }

// SetNOWS sets NOWS.
func (n *IdentifyNamespace) SetNOWS(v uint16) { le.PutUint16(n[72:74], v) }

// MSSRL returns the longest source range of a Copy, in blocks.
func (n *IdentifyNamespace) MSSRL() uint16 { return le.Uint16(n[74:76]) }

// SetMSSRL sets MSSRL.
func (n *IdentifyNamespace) SetMSSRL(v uint16) { le.PutUint16(n[74:76], v) }

// MCL returns the longest Copy, in blocks.
func (n *IdentifyNamespace) MCL() uint32 { return le.Uint32(n[76:80]) }

// SetMCL sets MCL.
func (n *IdentifyNamespace) SetMCL(v uint32) { le.PutUint32(n[76:80], v) }

// MSRC returns the number of source ranges of a Copy, 0-based.
func (n *IdentifyNamespace) MSRC() uint8 { return n[80] }

// SetMSRC sets MSRC.
func (n *IdentifyNamespace) SetMSRC(v uint8) { n[80] = v }

// NULBAF returns the number of LBA formats beyond NLBAF that are unique to this
// namespace.
func (n *IdentifyNamespace) NULBAF() uint8 { return n[82] }

// SetNULBAF sets NULBAF.
func (n *IdentifyNamespace) SetNULBAF(v uint8) { n[82] = v }

// ANAGRPID returns the ANA group; 0 if ANA is not reported.
func (n *IdentifyNamespace) ANAGRPID() uint32 { return le.Uint32(n[92:96]) }

// SetANAGRPID sets ANAGRPID.
func (n *IdentifyNamespace) SetANAGRPID(v uint32) { le.PutUint32(n[92:96], v) }

// NSATTR returns the attributes: bit 0 write protected. See
// [IdentifyNamespace.WriteProtected].
func (n *IdentifyNamespace) NSATTR() uint8 { return n[99] }

// SetNSATTR sets NSATTR.
func (n *IdentifyNamespace) SetNSATTR(v uint8) { n[99] = v }

// NVMSETID returns the NVM set; 0 means none.
func (n *IdentifyNamespace) NVMSETID() uint16 { return le.Uint16(n[100:102]) }

// SetNVMSETID sets NVMSETID.
func (n *IdentifyNamespace) SetNVMSETID(v uint16) { le.PutUint16(n[100:102], v) }

// ENDGID returns the endurance group; 0 means none.
func (n *IdentifyNamespace) ENDGID() uint16 { return le.Uint16(n[102:104]) }

// SetENDGID sets ENDGID.
func (n *IdentifyNamespace) SetENDGID(v uint16) { le.PutUint16(n[102:104], v) }

// NGUID returns the globally unique identifier, big endian; zero means none.
func (n *IdentifyNamespace) NGUID() [16]byte { return [16]byte(n[104:120]) }

// SetNGUID sets NGUID.
func (n *IdentifyNamespace) SetNGUID(v [16]byte) { copy(n[104:120], v[:]) }

// EUI64 returns the IEEE extended unique identifier, big endian; zero means none.
func (n *IdentifyNamespace) EUI64() [8]byte { return [8]byte(n[120:128]) }

// SetEUI64 sets EUI64.
func (n *IdentifyNamespace) SetEUI64(v [8]byte) { copy(n[120:128], v[:]) }

// IdentifyNamespaceNVM is Identify CNS 05h for CSINVM (NVM, "I/O Command Set
// Specific Identify Namespace Data Structure").
type IdentifyNamespaceNVM [IdentifySize]byte

// IdentifyNamespaceNVMAt returns the first 4096 bytes of b, without a copy. It panics if
// b is shorter.
func IdentifyNamespaceNVMAt(b []byte) *IdentifyNamespaceNVM {
	return (*IdentifyNamespaceNVM)(b[:IdentifySize:IdentifySize])
}

// NPDGL returns the preferred deallocate granularity, in blocks, 0-based; valid
// if OPTPERF is 2 or 3.
func (n *IdentifyNamespaceNVM) NPDGL() uint32 { return le.Uint32(n[268:272]) }

// SetNPDGL sets NPDGL.
func (n *IdentifyNamespaceNVM) SetNPDGL(v uint32) { le.PutUint32(n[268:272], v) }

// NPRG returns the preferred read granularity, in blocks, 0-based.
func (n *IdentifyNamespaceNVM) NPRG() uint32 { return le.Uint32(n[272:276]) }

// SetNPRG sets NPRG.
func (n *IdentifyNamespaceNVM) SetNPRG(v uint32) { le.PutUint32(n[272:276], v) }

// NPRA returns the preferred read alignment, in blocks, 0-based.
func (n *IdentifyNamespaceNVM) NPRA() uint32 { return le.Uint32(n[276:280]) }

// SetNPRA sets NPRA.
func (n *IdentifyNamespaceNVM) SetNPRA(v uint32) { le.PutUint32(n[276:280], v) }

// NORS returns the optimal read size, in blocks, 0-based.
func (n *IdentifyNamespaceNVM) NORS() uint32 { return le.Uint32(n[280:284]) }

// SetNORS sets NORS.
func (n *IdentifyNamespaceNVM) SetNORS(v uint32) { le.PutUint32(n[280:284], v) }

// NPDAL returns the preferred deallocate alignment, in blocks, 0-based; valid
// if OPTPERF is 2 or 3.
func (n *IdentifyNamespaceNVM) NPDAL() uint32 { return le.Uint32(n[284:288]) }

// SetNPDAL sets NPDAL.
func (n *IdentifyNamespaceNVM) SetNPDAL(v uint32) { le.PutUint32(n[284:288], v) }

// IdentifyNSIndependent is Identify CNS 08h (Base, "I/O Command Set Independent
// Identify Namespace Data Structure").
type IdentifyNSIndependent [IdentifySize]byte

// IdentifyNSIndependentAt returns the first 4096 bytes of b, without a copy. It panics if
// b is shorter.
func IdentifyNSIndependentAt(b []byte) *IdentifyNSIndependent {
	return (*IdentifyNSIndependent)(b[:IdentifySize:IdentifySize])
}

// Ready reports whether the namespace is ready for I/O.
func (n *IdentifyNSIndependent) Ready() bool { return n.NSTAT()&nstatReady != 0 }

// WriteProtected reports whether the namespace is write protected at present.
func (n *IdentifyNSIndependent) WriteProtected() bool { return n.NSATTR()&nsattrWriteProtected != 0 }

// NSFEAT returns the features: bit 4 rotational media, bit 5 no volatile write
// cache.
func (n *IdentifyNSIndependent) NSFEAT() uint8 { return n[0] }

// SetNSFEAT sets NSFEAT.
func (n *IdentifyNSIndependent) SetNSFEAT(v uint8) { n[0] = v }

// NMIC returns the multipath capabilities: bit 0 shared between controllers.
func (n *IdentifyNSIndependent) NMIC() uint8 { return n[1] }

// SetNMIC sets NMIC.
func (n *IdentifyNSIndependent) SetNMIC(v uint8) { n[1] = v }

// RESCAP returns the reservation capabilities; 0 means none.
func (n *IdentifyNSIndependent) RESCAP() uint8 { return n[2] }

// SetRESCAP sets RESCAP.
func (n *IdentifyNSIndependent) SetRESCAP(v uint8) { n[2] = v }

// FPI returns the progress of a format: bit 7 supported, bits 0-6 percent left.
func (n *IdentifyNSIndependent) FPI() uint8 { return n[3] }

// SetFPI sets FPI.
func (n *IdentifyNSIndependent) SetFPI(v uint8) { n[3] = v }

// ANAGRPID returns the ANA group; 0 if ANA is not reported.
func (n *IdentifyNSIndependent) ANAGRPID() uint32 { return le.Uint32(n[4:8]) }

// SetANAGRPID sets ANAGRPID.
func (n *IdentifyNSIndependent) SetANAGRPID(v uint32) { le.PutUint32(n[4:8], v) }

// NSATTR returns the attributes: bit 0 write protected.
func (n *IdentifyNSIndependent) NSATTR() uint8 { return n[8] }

// SetNSATTR sets NSATTR.
func (n *IdentifyNSIndependent) SetNSATTR(v uint8) { n[8] = v }

// NVMSETID returns the NVM set; 0 means none.
func (n *IdentifyNSIndependent) NVMSETID() uint16 { return le.Uint16(n[10:12]) }

// SetNVMSETID sets NVMSETID.
func (n *IdentifyNSIndependent) SetNVMSETID(v uint16) { le.PutUint16(n[10:12], v) }

// ENDGID returns the endurance group; 0 means none.
func (n *IdentifyNSIndependent) ENDGID() uint16 { return le.Uint16(n[12:14]) }

// SetENDGID sets ENDGID.
func (n *IdentifyNSIndependent) SetENDGID(v uint16) { le.PutUint16(n[12:14], v) }

// NSTAT returns the status: bit 0 not ready. See [IdentifyNSIndependent.Ready].
func (n *IdentifyNSIndependent) NSTAT() uint8 { return n[14] }

// SetNSTAT sets NSTAT.
func (n *IdentifyNSIndependent) SetNSTAT(v uint8) { n[14] = v }
