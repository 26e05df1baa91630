import java.util.ArrayList;
import java.util.List;
import java.util.zip.CRC32;

/** As churn.py, for the JVM: a lasting part, garbage that makes it collect, checks of both. */
public class Churn {
    static long sum(byte[] data) {
        CRC32 crc = new CRC32();
        crc.update(data);
        return crc.getValue();
    }

    public static void main(String[] arguments) throws Exception {
        List<byte[]> lasting = new ArrayList<>();
        List<Long> sums = new ArrayList<>();
        for (int n = 0; n < 24; n++) {
            byte[] block = new byte[1 << 20];
            for (int i = 0; i < block.length; i++) block[i] = (byte) (i * 31 + i / 4096 + n);
            lasting.add(block);
            sums.add(sum(block));
        }
        System.out.println("ready");
        int rounds = 0;
        long total = 0;
        while (System.in.available() == 0) {
            int which = rounds++ % 24;
            if (sum(lasting.get(which)) != sums.get(which)) throw new Error("block " + which);
            List<int[]> garbage = new ArrayList<>();
            for (int n = 0; n < 200; n++) {
                int[] data = new int[1000 + n];
                for (int i = 0; i < data.length; i++) data[i] = i ^ n;
                garbage.add(data);
            }
            for (int n = 0; n < 200; n++)
                for (int i = 0; i < garbage.get(n).length; i++)
                    if (garbage.get(n)[i] != (i ^ n)) throw new Error("garbage " + n);
            total += garbage.size();
            if (rounds % 10 == 0) System.gc();
            Thread.sleep(5);
        }
        System.out.println("OK " + rounds + " " + total);
    }
}
