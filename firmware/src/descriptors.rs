//! GDT, IDT and TSS as constants: selectors, gates and the stacks that traps switch to.

use crate::layout::{ABORT_STACK_TOP, STUBS, TRAP_STACK_TOP, TSS};

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_DATA: u16 = 0x18 | 3;
pub const USER_CODE: u16 = 0x20 | 3;
pub const TASK: u16 = 0x28;

/// The one vector ring 3 may raise itself, by `int3`. A software KVM that runs ring 3 natively
/// delivers no other software interrupt: `int n` arrives there as an invalid opcode.
pub const CALL_VECTOR: usize = 3;
/// Wake-ups during `wait`: the one-shot timer and the devices' lines.
pub const TIMER_VECTOR: usize = 0x21;
pub const DEVICE_VECTOR: usize = 0x22;
/// Local APICs want the low four bits of the spurious vector set.
pub const SPURIOUS_VECTOR: usize = 0x2f;
/// Exceptions, the call gate and the wake-ups; anything above is a general-protection fault.
pub const VECTORS: usize = 0x30;
/// Every entry stub is padded to this size (`traps.s`).
pub const STUB_SIZE: u64 = 16;

const PRESENT: u64 = 1 << 47;
const NON_SYSTEM: u64 = 1 << 44;
const EXECUTABLE: u64 = 1 << 43;
const READ_WRITE: u64 = 1 << 41;
const ACCESSED: u64 = 1 << 40;
const LONG_CODE: u64 = 1 << 53;
const RING_3: u64 = 3 << 45;
const AVAILABLE_TSS: u64 = 9 << 40;
const INTERRUPT_GATE: u64 = 0xe << 40;

/// Vectors that must not trust the ordinary trap stack.
const NMI: usize = 2;
const DOUBLE_FAULT: usize = 8;
const MACHINE_CHECK: usize = 18;

/// Segments for both rings and the task state; accessed bits set so that loading writes nothing.
pub const fn gdt() -> [u64; 7] {
    let code = PRESENT | NON_SYSTEM | EXECUTABLE | READ_WRITE | ACCESSED | LONG_CODE;
    let data = PRESENT | NON_SYSTEM | READ_WRITE | ACCESSED;
    let limit = TSS_SIZE as u64 - 1;
    let base = (TSS & 0xff_ffff) << 16 | (TSS >> 24 & 0xff) << 56;
    let task = PRESENT | AVAILABLE_TSS | limit | base;
    [0, code, data, data | RING_3, code | RING_3, task, TSS >> 32]
}

/// A 64-bit TSS is 104 bytes (SDM volume 3, 9.7).
pub const TSS_SIZE: usize = 104;

/// The task state: stacks only, and an I/O bitmap offset at the limit, which closes all ports.
#[repr(C, align(16))]
#[derive(Debug)]
pub struct Tss([u32; TSS_SIZE / 4]);

/// Ring-0 stack for ordinary traps, first interrupt stack for aborts.
pub const fn tss() -> Tss {
    let mut words = [0u32; TSS_SIZE / 4];
    words[1] = TRAP_STACK_TOP as u32;
    words[2] = (TRAP_STACK_TOP >> 32) as u32;
    words[9] = ABORT_STACK_TOP as u32;
    words[10] = (ABORT_STACK_TOP >> 32) as u32;
    words[25] = (TSS_SIZE as u32) << 16;
    Tss(words)
}

/// One 16-byte gate.
pub type Gate = [u64; 2];

/// Interrupt gates to the stubs; only the call gate is open to ring 3.
pub const fn idt() -> [Gate; VECTORS] {
    let mut gates = [[0; 2]; VECTORS];
    let mut vector = 0;
    while vector < VECTORS {
        gates[vector] = gate(vector);
        vector += 1;
    }
    gates
}

const fn gate(vector: usize) -> Gate {
    let target = STUBS + vector as u64 * STUB_SIZE;
    let stack: u64 = match vector {
        NMI | DOUBLE_FAULT | MACHINE_CHECK => 1 << 32,
        _ => 0,
    };
    let ring = if vector == CALL_VECTOR { RING_3 } else { 0 };
    let low = target & 0xffff | (KERNEL_CODE as u64) << 16 | (target >> 16 & 0xffff) << 48;
    [low | stack | INTERRUPT_GATE | ring | PRESENT, target >> 32]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{GDT, IDT, TABLES};

    fn target(gate: Gate) -> u64 {
        gate[0] & 0xffff | (gate[0] >> 48) << 16 | gate[1] << 32
    }

    #[test]
    fn every_gate_leads_to_its_stub_in_ring_0_with_interrupts_off() {
        for (vector, gate) in idt().into_iter().enumerate() {
            assert_eq!(target(gate), STUBS + vector as u64 * STUB_SIZE);
            assert_eq!(gate[0] >> 16 & 0xffff, u64::from(KERNEL_CODE));
            assert_eq!(gate[0] >> 40 & 0x1f, 0xe, "an interrupt gate");
            assert_ne!(gate[0] & PRESENT, 0);
        }
        assert!(STUBS + VECTORS as u64 * STUB_SIZE <= TABLES);
    }

    #[test]
    fn only_the_call_gate_is_open_to_ring_3() {
        for (vector, gate) in idt().into_iter().enumerate() {
            assert_eq!(gate[0] >> 45 & 3 == 3, vector == CALL_VECTOR, "{vector}");
        }
    }

    #[test]
    fn aborts_run_on_their_own_stack() {
        for (vector, gate) in idt().into_iter().enumerate() {
            let own = matches!(vector, NMI | DOUBLE_FAULT | MACHINE_CHECK);
            assert_eq!(gate[0] >> 32 & 7, u64::from(own), "{vector}");
        }
        let words = tss().0;
        assert_eq!(u64::from(words[1]), TRAP_STACK_TOP);
        assert_eq!(u64::from(words[9]), ABORT_STACK_TOP);
    }

    #[test]
    fn ring_3_has_no_port() {
        assert_eq!(tss().0[25] >> 16, 104, "the bitmap starts at the limit");
    }

    #[test]
    fn the_gdt_describes_the_task_state() {
        let gdt = gdt();
        assert_eq!(gdt[5] & 0xffff, 103);
        assert_eq!(
            (gdt[5] >> 16 & 0xff_ffff) | (gdt[5] >> 56) << 24 | gdt[6] << 32,
            TSS
        );
        assert!(TSS + TSS_SIZE as u64 <= GDT && GDT.is_multiple_of(16));
        assert_eq!(IDT % 0x1000, 0);
        assert_eq!(gdt[usize::from(USER_CODE) / 8] >> 45 & 3, 3);
        assert_eq!(gdt[usize::from(KERNEL_CODE) / 8] >> 45 & 3, 0);
    }
}
