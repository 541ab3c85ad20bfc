# probe(function, argument): runs a function that is expected to fault. rax = vector and rdx = error
# code if it did; rax = 0xffff if it came back, 0xfffe if ring 0 refuses.
.section .text.probe, "ax"
.globl probe
.balign 16
probe:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    sub rsp, 8
    mov r12, rdi
    mov r13, rsi
    # expect_fault(2f, rsp)
    mov eax, {call_expect}
    lea rdi, [rip + 2f]
    mov rsi, rsp
    int3
    test rax, rax
    mov eax, 0xfffe
    jnz 2f
    mov rdi, r13
    call r12
    # It came back: take the expectation back too.
    mov eax, {call_expect}
    xor edi, edi
    int3
    mov eax, 0xffff
2:  cld
    add rsp, 8
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
