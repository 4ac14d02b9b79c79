# A guest of one sector, for accelerators on which no Linux boots. SeaBIOS loads it to 0x7c00, in real mode.
#
# 18 times a second (the BIOS's timer) it goes over 64 pages from 0x10000 on: at both ends of each the count of the tick before
# must stand, and this tick's is written there. So a page that is lost, stale or another one's is noticed at the next tick.
# Console: `C <ticks> err=<pages that were wrong>`, one line a tick.
        .code16
        .equ    COM1, 0x3f8
        .equ    FIRST, 0x1000           # of the pages, as segments
        .equ    BEHIND, 0x5000
        .equ    LAST_WORD, 4092

        .globl  _start
_start: cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x7c00, %sp
        xorl    %ebx, %ebx              # ticks
        xorl    %ebp, %ebp              # errors
        movw    $FIRST, %di
clear:  movw    %di, %es
        movl    %ebx, %es:0
        movl    %ebx, %es:LAST_WORD
        addw    $0x100, %di
        cmpw    $BEHIND, %di
        jb      clear

tick:   sti
        hlt
        cli
        movw    $FIRST, %di
page:   movw    %di, %es
        cmpl    %ebx, %es:0
        jne     wrong
        cmpl    %ebx, %es:LAST_WORD
        je      right
wrong:  incl    %ebp
right:  leal    1(%ebx), %eax
        movl    %eax, %es:0
        movl    %eax, %es:LAST_WORD
        addw    $0x100, %di
        cmpw    $BEHIND, %di
        jb      page
        incl    %ebx

        movw    $count, %si
        call    text
        movl    %ebx, %eax
        call    number
        movw    $errors, %si
        call    text
        movl    %ebp, %eax
        call    number
        movb    $'\n', %al
        call    put
        jmp     tick

number: movl    $10, %ecx               # eax in decimal
        xorw    %di, %di
digit:  xorl    %edx, %edx
        divl    %ecx
        pushw   %dx
        incw    %di
        testl   %eax, %eax
        jnz     digit
spell:  popw    %ax
        addb    $'0', %al
        call    put
        decw    %di
        jnz     spell
        ret

text:   lodsb                           # up to a zero byte
        testb   %al, %al
        jz      done
        call    put
        jmp     text

put:    movb    %al, %ah                # one character
        movw    $(COM1 + 5), %dx
busy:   inb     %dx, %al
        testb   $0x20, %al
        jz      busy
        movw    $COM1, %dx
        movb    %ah, %al
        outb    %al, %dx
done:   ret

count:  .asciz  "C "
errors: .asciz  " err="
        .org    510
        .word   0xaa55
