# memcpy, memmove, memset, memcmp: the compiler calls them by name, and there is no C library.
# Small sizes by overlapping moves, large ones by the string instructions, which modern processors
# run a cache line at a time.

.section .text.memory, "ax"
.globl memcpy
.globl memmove
.globl memset
.globl memcmp
.globl bcmp
.balign 16
# rdi = to, rsi = from, rdx = length; every path up to 32 bytes loads all before it stores.
memmove:
    mov rax, rdi
    sub rax, rsi
    cmp rax, rdx
    jb 7f
memcpy:
    mov rax, rdi
    cmp rdx, 16
    jb 3f
    cmp rdx, 32
    ja 2f
1:  movups xmm0, [rsi]
    movups xmm1, [rsi + rdx - 16]
    movups [rdi], xmm0
    movups [rdi + rdx - 16], xmm1
    ret
2:  cmp rdx, 64
    ja 6f
    movups xmm0, [rsi]
    movups xmm1, [rsi + 16]
    movups xmm2, [rsi + rdx - 32]
    movups xmm3, [rsi + rdx - 16]
    movups [rdi], xmm0
    movups [rdi + 16], xmm1
    movups [rdi + rdx - 32], xmm2
    movups [rdi + rdx - 16], xmm3
    ret
3:  cmp rdx, 8
    jb 4f
    mov rcx, [rsi]
    mov r8, [rsi + rdx - 8]
    mov [rdi], rcx
    mov [rdi + rdx - 8], r8
    ret
4:  cmp rdx, 4
    jb 5f
    mov ecx, [rsi]
    mov r8d, [rsi + rdx - 4]
    mov [rdi], ecx
    mov [rdi + rdx - 4], r8d
    ret
5:  test rdx, rdx
    jz 9f
    movzx ecx, byte ptr [rsi]
    movzx r8d, byte ptr [rsi + rdx - 1]
    cmp rdx, 3
    jb 8f
    movzx r9d, byte ptr [rsi + 1]
    mov [rdi + 1], r9b
8:  mov [rdi], cl
    mov [rdi + rdx - 1], r8b
9:  ret
6:  mov rcx, rdx
    rep movsb
    ret
# Overlapping with the destination above the source: up to 64 bytes as above, else backwards.
7:  cmp rdx, 64
    jbe memcpy
    mov rax, rdi
    mov rcx, rdx
    lea rsi, [rsi + rdx - 1]
    lea rdi, [rdi + rdx - 1]
    std
    rep movsb
    cld
    ret

.balign 16
# rdi = to, esi = byte, rdx = length
memset:
    mov r8, rdi
    movzx eax, sil
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret

.balign 16
# rdi, rsi = the two, rdx = length; eax < 0, 0, > 0
memcmp:
bcmp:
    xor ecx, ecx
1:  lea r8, [rcx + 8]
    cmp r8, rdx
    ja 2f
    mov rax, [rdi + rcx]
    cmp rax, [rsi + rcx]
    jne 3f
    mov rcx, r8
    jmp 1b
2:  cmp rcx, rdx
    jae 4f
3:  movzx eax, byte ptr [rdi + rcx]
    movzx r8d, byte ptr [rsi + rcx]
    inc rcx
    sub eax, r8d
    jz 2b
    ret
4:  xor eax, eax
    ret
