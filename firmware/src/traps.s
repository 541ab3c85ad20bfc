# What ring 0 does after boot: report a fault and end, or serve one of four calls.

# One stub per vector, 16 bytes apart, so that the IDT is a constant.
.section .fw.stubs, "ax"
.code64
# Vectors for which the processor pushes an error code: 8, 10-14, 17, 21, 29, 30.
.set with_error, 0x60227d00
.set vector, 0
.rept {vectors}
.balign 16
.if vector == {call_vector}
    jmp call_from_ring_3
.elseif vector >= 32
    jmp wake
.else
.if ((with_error >> vector) & 1) == 0
    push 0
.endif
    .byte 0x6a, vector
    jmp fault
.endif
.set vector, vector + 1
.endr
.balign 16

.section .fw.text, "ax"
.code64

# A timer or device interrupt: it only had to end a `hlt`.
wake:
    push rax
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    pop rax
    iretq

# Stack: vector, error, rip, cs, rflags, rsp, ss.
fault:
    cld
    test byte ptr [rsp + 24], 3
    jz report_fault
    mov rbx, [rip + fw_resume]
    test rbx, rbx
    jz report_fault
    # The self-test expects this one: back to ring 3 with rax = vector, rdx = error, rsi = cr2.
    mov qword ptr [rip + fw_resume], 0
    mov rcx, [rip + fw_resume + 8]
    mov rsi, cr2
    pop rax
    pop rdx
    mov [rsp], rbx
    mov [rsp + 24], rcx
    iretq

report_fault:
    # A fault while reporting one: no more words, only the exit code.
    cmp byte ptr [rip + fw_reporting], 0
    jne 9f
    mov byte ptr [rip + fw_reporting], 1
    mov rbp, rsp
    lea rdi, [rip + fw_line]
    lea rsi, [rip + text_vector]
    call put_text
    mov eax, [rbp]
    call put_decimal
    lea rsi, [rip + text_error]
    call put_text
    mov eax, [rbp + 8]
    call put_decimal
    lea rsi, [rip + text_ring]
    call put_text
    mov eax, [rbp + 24]
    and eax, 3
    call put_decimal
    lea rsi, [rip + text_rip]
    call put_text
    mov rax, [rbp + 16]
    call put_hex
    lea rsi, [rip + text_cr2]
    call put_text
    mov rax, cr2
    call put_hex
    lea rsi, [rip + text_rsp]
    call put_text
    mov rax, [rbp + 40]
    call put_hex
    lea rsi, [rip + text_stack]
    call put_text
    call put_stack
    lea rsi, [rip + text_end]
    call put_text
    lea rsi, [rip + fw_line]
    mov rcx, rdi
    sub rcx, rsi
    mov edx, {debug_port}
    rep outsb
9:  mov eax, {code_fault}
end_machine:
    mov edx, {exit_port}
    out dx, eax
1:  cli
    hlt
    jmp 1b

# Appends the text at rsi (one byte of length first) to the line at rdi.
put_text:
    movzx ecx, byte ptr [rsi]
    inc rsi
    rep movsb
    ret

# Appends eax in decimal.
put_decimal:
    mov r8d, 10
    xor ecx, ecx
1:  xor edx, edx
    div r8d
    push rdx
    inc ecx
    test eax, eax
    jnz 1b
2:  pop rax
    add al, 48
    stosb
    dec ecx
    jnz 2b
    ret

# Appends rax as a quoted 64-bit hexadecimal number.
put_hex:
    lea r8, [rip + hex_digits]
    mov r9, rax
    mov eax, 0x783022
    mov [rdi], eax
    add rdi, 3
    mov ecx, 16
1:  rol r9, 4
    mov eax, r9d
    and eax, 15
    mov al, [r8 + rax]
    stosb
    dec ecx
    jnz 1b
    mov al, 34
    stosb
    ret

# Appends up to eight words of the ring-3 stack, as far as rsp lies inside it.
put_stack:
    test byte ptr [rbp + 24], 3
    jz 3f
    mov rsi, [rbp + 40]
    mov r11d, 8
1:  mov eax, {stack_bottom}
    cmp rsi, rax
    jb 3f
    mov eax, {stack_top} - 8
    cmp rsi, rax
    ja 3f
    mov rax, [rsi]
    call put_hex
    add rsi, 8
    mov al, 44
    stosb
    dec r11d
    jnz 1b
3:  cmp byte ptr [rdi - 1], 44
    jne 4f
    dec rdi
4:  ret

# Calls from ring 3: rax = number, rdi and rsi = arguments, rax = result (0, or -1: refused).
# rcx, rdx, rsi, rdi, r8 and r9 are clobbered.
call_from_ring_3:
    cld
    cmp eax, {call_exit}
    je call_exit
    cmp eax, {call_report}
    je call_report
    cmp eax, {call_wait}
    je call_wait
    cmp eax, {call_expect}
    je call_expect_fault
refused:
    mov rax, -1
    iretq

call_exit:
    mov eax, edi
    jmp end_machine

# report(pointer, length): the bytes must lie where ring 3 may read; an unmapped page among
# them is a fault of ring 0, which ends the machine with its own line.
call_report:
    cmp rsi, {report_limit}
    ja refused
    mov eax, {text}
    cmp rdi, rax
    jb refused
    mov rcx, rsi
    add rsi, rdi
    mov eax, {ram_end}
    cmp rdi, rax
    ja refused
    cmp rsi, rax
    ja refused
    mov rsi, rdi
    mov edx, {debug_port}
    rep outsb
    xor eax, eax
    iretq

# wait(microseconds): sleeps until an interrupt or until the time is over.
call_wait:
    mov eax, 1000000
    cmp rdi, rax
    cmova rdi, rax
    # At least one count: zero would stop the timer and the sleep had no end.
    imul rdi, rdi, 1000
    inc rdi
    mov edx, 0xfee00000
    cmp byte ptr [rip + fw_can_wait], 0
    je prepare_wait
1:  mov [rdx + 0x380], edi
    sti
    hlt
    cli
    mov dword ptr [rdx + 0x380], 0
    xor eax, eax
    iretq

# Once: the local APIC's timer as one-shot at 1 GHz (QEMU, KVM) and the IO-APIC's lines,
# edge-triggered.
prepare_wait:
    mov byte ptr [rip + fw_can_wait], 1
    mov dword ptr [rdx + 0xf0], 0x100 | {spurious_vector}
    mov dword ptr [rdx + 0x3e0], 11
    mov dword ptr [rdx + 0x320], {timer_vector}
    mov esi, 0xfec00000
    mov ecx, 0x10 + 2 * 5
2:  mov [rsi], ecx
    mov dword ptr [rsi + 0x10], {device_vector}
    inc ecx
    mov [rsi], ecx
    mov dword ptr [rsi + 0x10], 0
    inc ecx
    cmp ecx, 0x10 + 2 * 24
    jne 2b
    jmp 1b

# expect_fault(rip, rsp): the next fault of ring 3 continues there; rip 0 takes it back.
# Only for a machine whose command line, which ring 3 cannot write, asks for the self-test.
call_expect_fault:
    cmp byte ptr [rip + fw_selftest], 0
    jne 1f
    push rsi
    call find_selftest
    pop rsi
    cmp byte ptr [rip + fw_selftest], 0
    je refused
1:  mov [rip + fw_resume + 8], rsi
    mov [rip + fw_resume], rdi
    xor eax, eax
    iretq

# Looks for the word in the command line that the start info points to.
find_selftest:
    mov r8, [rip + fw_start_info]
    call is_low
    jc 9f
    mov r8, [r8 + 24]
    call is_low
    jc 9f
    # At most 2 KiB, and never past the end of low memory.
    lea r9, [r8 + 2048]
    mov eax, {low_end} - 16
    cmp r9, rax
    cmova r9, rax
1:  cmp r8, r9
    jae 9f
    cmp byte ptr [r8], 0
    je 9f
    mov rsi, r8
    lea rdx, [rip + word_selftest]
    mov ecx, 15
2:  mov al, [rsi]
    cmp al, [rdx]
    jne 3f
    inc rsi
    inc rdx
    dec ecx
    jnz 2b
    mov byte ptr [rip + fw_selftest], 1
    ret
3:  inc r8
    jmp 1b
9:  ret

# Carry unless r8 is an address in low memory with room for a start info behind it.
is_low:
    cmp r8, 0x1000
    jb 1f
    mov eax, {low_end} - 64
    cmp rax, r8
1:  ret

hex_digits:
    .ascii "0123456789abcdef"
word_selftest:
    .ascii "sluice.selftest"
.macro text name, value
\name:
    .byte 8f - 7f
7:  .ascii "\value"
8:
.endm
text text_vector, "{{\"sluice\":\"fault\",\"vector\":"
text text_error, ",\"error\":"
text text_ring, ",\"ring\":"
text text_rip, ",\"rip\":"
text text_cr2, ",\"cr2\":"
text text_rsp, ",\"rsp\":"
text text_stack, ",\"stack\":["
text text_end, "]}}\n"

.section .fw.data, "aw"
.balign 16
fw_resume:
    .quad 0, 0
fw_reporting:
    .byte 0
fw_can_wait:
    .byte 0
fw_selftest:
    .byte 0
.balign 16
fw_line:
    .zero 512
