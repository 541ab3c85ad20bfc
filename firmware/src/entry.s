# PVH entry to ring 3: 32-bit protected mode without paging in, 64-bit user mode out.
# Some fifty instructions and no loop: where ring 0 is emulated each costs 0.6 us.
# In: ebx = address of hvm_start_info. Out (ring 3, System V): rdi = that address,
# rsi = TSC at entry, rdx = TSC before the drop to ring 3.

.section .fw.text, "ax"
.code32
.globl pvh_entry
pvh_entry:
    cli
    cld
    rdtsc
    mov esi, eax
    mov ebp, edx
    mov edi, ebx

    # Without no-execute pages none of the promises hold.
    mov eax, 0x80000001
    cpuid
    test edx, 1 << 20
    jz refuse

    # CR4: PAE (5) for long mode, OSFXSR (9) and OSXMMEXCPT (10) for SSE; where the processor has
    # them, SMEP (20): ring 0 executes nothing of ring 3's, and UMIP (11): ring 3 does not learn
    # where ring 0's tables are.
    xor eax, eax
    cpuid
    mov ebx, 0
    mov ecx, 0
    cmp eax, 7
    jb 1f
    mov eax, 7
    cpuid
1:  mov eax, (1 << 5) | (1 << 9) | (1 << 10)
    mov edx, eax
    or edx, 1 << 20
    test ebx, 1 << 7
    cmovnz eax, edx
    mov edx, eax
    or edx, 1 << 11
    test ecx, 1 << 2
    cmovnz eax, edx
    mov cr4, eax
    mov eax, {tables}
    mov cr3, eax
    # EFER: LME (8), NXE (11).
    mov ecx, 0xc0000080
    rdmsr
    or eax, (1 << 8) | (1 << 11)
    wrmsr
    # CR0: PE (0), MP (1), ET (4), NE (5), WP (16), PG (31); EM, TS and cache-disable off.
    mov eax, (1 << 0) | (1 << 1) | (1 << 4) | (1 << 5) | (1 << 16) | (1 << 31)
    mov cr0, eax

    lgdt [fw_gdt_pointer]
    # Far jump into the 64-bit code segment.
    .byte 0xea
    .long long_mode
    .word {kernel_code}

refuse:
    mov esi, offset refuse_line
    mov ecx, offset refuse_length
    mov edx, {debug_port}
    rep outsb
    mov eax, {code_refused}
    mov edx, {exit_port}
    out dx, eax
1:  hlt
    jmp 1b
refuse_line:
    .ascii "{{\"sluice\":\"boot\",\"refused\":\"the processor has no no-execute pages\"}}\n"
refuse_line_end:
.set refuse_length, refuse_line_end - refuse_line

.code64
long_mode:
    mov eax, {kernel_data}
    mov ss, eax
    mov esp, {trap_stack}
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    lidt [rip + fw_idt_pointer]
    mov eax, {task}
    ltr ax
    # edi and esi kept their upper halves undefined across the mode switch.
    mov edi, edi
    mov [rip + fw_start_info], rdi
    shl rbp, 32
    mov esi, esi
    or rsi, rbp
    rdtsc
    shl rdx, 32
    or rdx, rax

    xor ebx, ebx
    xor ecx, ecx
    xor ebp, ebp
    push {user_data}
    # A function expects its stack as after a call: 8 below a multiple of 16.
    push {stack_top} - 8
    # Interrupts stay off in ring 3; only `wait` opens them, in ring 0.
    push 2
    push {user_code}
    push offset {entry}
    xor eax, eax
    iretq

.section .fw.data, "aw"
.balign 16
fw_gdt_pointer:
    .word 7 * 8 - 1
    .quad {gdt}
.balign 16
fw_idt_pointer:
    .word {vectors} * 16 - 1
    .quad {idt}
fw_start_info:
    .quad 0

# The PVH note: where a VMM enters, in 32-bit mode.
.section .note.pvh, "a", @note
.balign 4
    .long 4
    .long 4
    .long 18
    .asciz "Xen"
    .long pvh_entry
