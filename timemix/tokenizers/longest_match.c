/* Tokenization by longest match.

   At each position p of a text, the token is the longest entry of the vocabulary that equals text[p], text[p + 1], ...
   The next position is the end of this token.

   The vocabulary is a trie. The nodes of the trie are the distinct beginnings of the entries, and node 0 is the empty
   beginning. The child of a node by the byte b is

       children[row + b - low]   if low <= b < low + span, otherwise no child,

   where 0 also means that there is no child, because node 0 is nobody's child. */

#include <stdint.h>

typedef struct {
    int32_t row;   /* start of the node's row in `children` */
    int32_t token; /* id of the entry that equals this beginning, or -1 */
    uint16_t low;  /* smallest byte that leads to a child */
    uint16_t span; /* length of the row */
} Node;

/* Encode text[*position], ..., text[length - 1] until the end of the text or until `room` ids are written. Return the
   number of ids, and set *position to the end of the last token. Every byte is an entry, so each step makes progress. */
int64_t timemix_longest_match(const Node *nodes, const int32_t *children, const uint8_t *text, int64_t length,
                              int64_t *position, int32_t *ids, int64_t room) {
    int64_t start = *position, count = 0;
    while (start < length && count < room) {
        const Node *node = nodes;
        int64_t end = start;
        for (int64_t i = start; i < length; i++) {
            /* A byte below `low` wraps around to a large number. */
            uint32_t place = (uint32_t)text[i] - node->low;
            if (place >= node->span)
                break;
            int32_t child = children[node->row + place];
            if (child == 0)
                break;
            node = nodes + child;
            if (node->token >= 0) {
                ids[count] = node->token;
                end = i + 1;
            }
        }
        count++;
        start = end;
    }
    *position = start;
    return count;
}
